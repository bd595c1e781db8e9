"""Bars on a terminal, in two levels: products of a run, and the batches of one product."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from tqdm import tqdm

from torchlinop.settings import hidden

Item = TypeVar("Item")

_SHOWING: ContextVar[bool] = ContextVar("showing", default=False)


@contextmanager
def products_shown(progress: bool, total: int | None = None) -> Iterator[Callable[[int], object]]:
    """A bar of ``total`` products, where the output is a terminal; yields how to advance it.

    Of several ranks, the first alone shows one.
    """
    disable = hidden(progress) if _is_first_rank() else True
    with tqdm(total=total, unit="matvec", disable=disable) as bar:
        token = _SHOWING.set(not bar.disable)
        try:
            yield bar.update
        finally:
            _SHOWING.reset(token)


def _is_first_rank() -> bool:
    distributed: Any = sys.modules.get("torch.distributed")  # absent from some builds of torch
    started = distributed and distributed.is_available() and distributed.is_initialized()
    return not started or distributed.get_rank() == 0


def batches_shown(batches: Iterable[Item], total: int) -> Iterable[Item]:
    """The same batches, under a bar of their own if products are shown and there are several."""
    if not _SHOWING.get() or total < 2:
        return batches
    return tqdm(batches, total=total, unit="batch", position=1, leave=False)
