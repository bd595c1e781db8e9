"""Bytes of a device at their peak, above what was held before."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def peak_above(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Yields a function that tells the peak since the start; None where it is not known."""
    if device.type != "cuda":
        yield lambda: None
        return
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield lambda: torch.cuda.max_memory_allocated(device) - before


def free(device: torch.device) -> None:
    """Give back what earlier work has dropped."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
