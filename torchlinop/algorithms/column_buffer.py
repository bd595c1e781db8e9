"""Columns (n, size) as rows of one buffer, which grows."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinop.algorithms.products import working_dtype
from torchlinop.space import VectorSpace


class ColumnBuffer:
    """Columns in working precision, as many as were appended; ``capacity`` of them allocated."""

    def __init__(self, space: VectorSpace, capacity: int = 0) -> None:
        self._rows = torch.empty(
            capacity, space.local_size, dtype=working_dtype(space.dtype), device=space.device
        )
        self.size = 0

    @property
    def columns(self) -> Tensor:
        """All of them (n, size), a view."""
        return self._rows[: self.size].mT

    def append(self, X: Tensor) -> Tensor:
        """Copy X (n, k) behind the last column; the copy, a view."""
        stop = self.size + X.shape[1]
        self.reserve(stop)
        copy = self._rows[self.size : stop].mT
        copy.copy_(X)
        self.size = stop
        return copy

    def reserve(self, capacity: int) -> None:
        """Allocate as many columns, if there are fewer."""
        missing = capacity - len(self._rows)
        if missing > 0:
            more = self._rows.new_empty(missing, self._rows.shape[1])
            self._rows = torch.cat([self._rows, more]) if len(self._rows) else more
