"""How many columns of a block go through one pass: measured once, bounded by memory."""

from __future__ import annotations

import logging
import math
import time

import torch
from torch import Tensor

from torchlinop.derivatives import LinearMap
from torchlinop.errors import OptionError, TorchlinopError

log = logging.getLogger("torchlinop")

_CANDIDATES = (4, 16)
_LEAST_GAIN = 0.1  # a wider pass costs memory, and timings are noisy
_ALIKE = 0.05  # relative; kernels for blocks in bfloat16 round otherwise by a hundredth


class ColumnChunks:
    """Applies a map to a block in chunks of columns.

    Blocks do not always pay: on a CPU a block of 8 can be slower per column than single
    products. Unless ``size`` is given, the first block of at least four columns is used to time
    one column against four (and sixteen), at most ``limit`` of them at once.
    """

    def __init__(self, size: int | None = None, limit: int = 16) -> None:
        if size is not None and not (isinstance(size, int) and size >= 1):
            raise OptionError(
                f"expected column_chunk to be an integer of at least 1, got {size!r}; leave it out"
            )
        self.size = size
        self._limit = limit
        self._proven = False  # that columns go through one pass, or that there is but one

    def apply(self, product: LinearMap, V: Tensor, *, last: bool) -> Tensor:
        """``product`` of every column of V (n, k); ``last`` frees its memory on the way."""
        size = self.size or self._measured(product, V)
        if size == 1 or self._proven:
            return self._in_chunks(product, V, size, last=last)
        try:
            # One that is to free its memory could not be taken again.
            AV = self._in_chunks(product, V, size, last=last and V.shape[1] > size)
        except (torch.OutOfMemoryError, TorchlinopError):
            raise
        except RuntimeError as error:  # an operation that cannot be batched
            _log_single(error)
            self.size = 1
            return self._in_chunks(product, V, 1, last=last)
        self._proven = V.shape[1] > 1
        return AV

    def _in_chunks(self, product: LinearMap, V: Tensor, size: int, *, last: bool) -> Tensor:
        k = V.shape[1]
        if k <= size:
            return product(V, last=last)
        # Columns as rows of contiguous memory: each is read and written at full speed.
        rows = V.mT.contiguous()
        first = product(rows[:size].mT, last=False)
        products = first.new_empty(k, len(first))
        products[:size] = first.mT
        for start in range(size, k, size):
            part = slice(start, start + size)
            products[part] = product(rows[part].mT, last=last and start + size >= k).mT
        return products.mT

    def _measured(self, product: LinearMap, V: Tensor) -> int:
        if V.shape[1] < _CANDIDATES[0]:
            return 1
        best = 1
        for candidate in _CANDIDATES:
            if candidate > min(self._limit, V.shape[1]):
                break
            try:
                saved = _saved_by(product, V[:, :best], V[:, :candidate])
            except RuntimeError as error:  # an operation that cannot be batched, or is so wrongly
                _log_single(error)
                break
            if saved < _LEAST_GAIN:
                break
            best = candidate
        self.size = best
        log.info("%d columns go through one pass", best)
        return best


def _log_single(error: RuntimeError) -> None:
    log.info("products are taken column by column: %s", error)


def _saved_by(product: LinearMap, narrow: Tensor, wide: Tensor) -> float:
    """The fraction of the time per column that ``wide`` saves, the best of three runs in turn.

    Raises:
        RuntimeError: it gives something else, by a mistake in torch's rule for a block.
    """
    of_narrow, of_wide = math.inf, math.inf
    for _ in range(3):
        seconds, alone = _timed(product, narrow)
        of_narrow = min(of_narrow, seconds)
        seconds, together = _timed(product, wide)
        of_wide = min(of_wide, seconds)
    within = together[:, : alone.shape[1]]
    if torch.linalg.vector_norm(within - alone) > _ALIKE * torch.linalg.vector_norm(alone):
        raise RuntimeError("in a block of several columns they have other products")
    return 1 - (of_wide / wide.shape[1]) / (of_narrow / narrow.shape[1])


def _timed(product: LinearMap, V: Tensor) -> tuple[float, Tensor]:
    _wait(V)
    start = time.perf_counter()
    AV = product(V)
    _wait(V)
    return time.perf_counter() - start, AV


def _wait(V: Tensor) -> None:
    if V.is_cuda:
        torch.cuda.synchronize(V.device)
