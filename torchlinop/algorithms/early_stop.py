"""Blocks of products up to the last, to Ctrl-C or to the end of the time: what is there counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

from torchlinop.algorithms.products import Products
from torchlinop.errors import NotConvergedWarning, warn_caller


class WithWarnings(Protocol):
    """A result that says what is wrong with it."""

    @property
    def warnings(self) -> tuple[str, ...]: ...


Answer = TypeVar("Answer", bound=WithWarnings)


def taken(products: Products, blocks: Iterator[None], usable: Callable[[], object]) -> str:
    """Go through ``blocks``, which yields before each of them; why it ended early, or "".

    Not before what there is is ``usable``: until then, time does not count, and Ctrl-C passes on.
    """
    try:
        for _ in blocks:
            if products.late and usable():
                return "out of time"
    except KeyboardInterrupt:
        if not usable():
            raise
        return "interrupted"
    return ""


def notes(stopped: str, products: Products, granted: int) -> tuple[str, ...]:
    """The warning of a result that was made of fewer products than were granted."""
    return (f"{stopped} after {products.matvecs} of {granted} products",) if stopped else ()


def announced(result: Answer) -> Answer:
    """The result, with its warnings given to the caller."""
    for warning in result.warnings:
        warn_caller(warning, NotConvergedWarning)
    return result
