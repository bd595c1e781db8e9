"""How many columns of a block go through one pass: measured once, bounded by memory."""

from __future__ import annotations

import logging
import time

import torch
from torch import Tensor

from torchlinop.derivatives import HessianMap
from torchlinop.errors import OptionError

log = logging.getLogger("torchlinop")

_CANDIDATES = (4, 16)
_GAIN = 0.9  # a wider pass must save this much, as it costs memory and timings are noisy


class ColumnChunks:
    """Applies a map to a block in chunks of columns.

    Blocks do not always pay: on a CPU a block of 8 can be slower per column than single
    products. Unless ``size`` is given, the first block of at least four columns is used to time
    one column against four (and sixteen), at most ``limit`` of them at once.
    """

    def __init__(self, size: int | None = None, limit: int = 16) -> None:
        if size is not None and size < 1:
            raise OptionError(f"expected column_chunk to be at least 1, got {size}")
        self.size = size
        self._limit = limit

    def apply(self, product: HessianMap, V: Tensor, *, last: bool) -> Tensor:
        """``product`` of every column of V (n, k); ``last`` frees its memory on the way."""
        size = self.size or self._measured(product, V)
        chunks = V.split(size, dim=1)
        if len(chunks) == 1:
            return product(V, last=last)
        final = len(chunks) - 1
        parts = [product(c, last=last and i == final).mT for i, c in enumerate(chunks)]
        return torch.cat(parts).mT

    def _measured(self, product: HessianMap, V: Tensor) -> int:
        if V.shape[1] < _CANDIDATES[0]:
            return 1
        best, seconds = 1, _seconds(product, V[:, :1])
        for candidate in _CANDIDATES:
            if candidate > min(self._limit, V.shape[1]):
                break
            try:
                each = _seconds(product, V[:, :candidate]) / candidate
            except RuntimeError as error:  # an operation that cannot be batched
                log.info("products are taken column by column: %s", error)
                break
            if each > _GAIN * seconds:
                break
            best, seconds = candidate, each
        self.size = best
        log.info("%d columns go through one pass (%.3g s each)", best, seconds)
        return best


def _seconds(product: HessianMap, V: Tensor) -> float:
    """The faster of two runs: the first one also pays for what is built once."""
    times = []
    for _ in range(2):
        _wait(V)
        start = time.perf_counter()
        product(V)
        _wait(V)
        times.append(time.perf_counter() - start)
    return min(times)


def _wait(V: Tensor) -> None:
    if V.is_cuda:
        torch.cuda.synchronize(V.device)
