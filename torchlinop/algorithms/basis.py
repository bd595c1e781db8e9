"""Orthonormal columns V (n, j) as rows of one buffer: V^H W and W - V H, wherever V is stored."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from torchlinop.space import VectorSpace

_GROUP = 8  # stored vectors converted at once, where they are stored coarser or elsewhere


def small_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of projected matrices: double precision, real or complex."""
    return torch.complex128 if dtype.is_complex else torch.float64


def subtract(W: Tensor, V: Tensor, H: Tensor) -> None:
    """``W -= V H``, in place and without memory of length n."""
    if W.shape[1] == 1:
        W[:, 0].addmv_(V, H[:, 0].to(W.dtype), alpha=-1)
    else:
        W.addmm_(V, H.to(W.dtype), alpha=-1)


class Basis:
    """Columns (n, capacity) in one buffer, allocated once, of which a solver fills the first.

    A buffer of fewer bits holds √n v, rounded to a power of two: the entries of a unit vector are
    about 1/√n, where float16 has lost most of its digits.
    """

    def __init__(
        self, space: VectorSpace, start: Tensor, capacity: int, *, dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:  # fmt: skip
        n = len(start)
        self.space = space
        self.dtype, self.device = start.dtype, start.device
        self.rows = torch.empty(
            capacity, n, dtype=dtype or start.dtype, device=device or start.device
        )
        self.direct = self.rows.dtype == start.dtype and self.rows.device == start.device
        coarser = self.rows.dtype != start.dtype
        self._room: Tensor | None = None  # what was handed out last
        self._scale = 2.0 ** round(math.log2(space.size) / 2) if coarser else 1.0

    def columns(self, start: int, stop: int) -> Tensor:
        """Columns (n, stop - start) in working precision: a view where the buffer has it."""
        rows = self.rows[start:stop]
        if self.direct:
            return rows.mT
        return rows.to(device=self.device, dtype=self.dtype).div_(self._scale).mT

    def room(self, start: int, width: int) -> Tensor:
        """Memory for columns (n, width) that will be put at ``start``: there, if that can be."""
        if self.direct:
            self._room = self.rows[start : start + width].mT
            return self._room
        n = self.rows.shape[1]
        return torch.empty(width, n, dtype=self.dtype, device=self.device).mT

    def put(self, start: int, Q: Tensor) -> Tensor:
        """Store Q (n, w) as columns ``start`` and following; Q in working precision again."""
        rows = self.rows[start : start + Q.shape[1]]
        if Q is self._room:  # it is there
            return Q
        rows.copy_(Q.mT if self._scale == 1 else Q.mT * self._scale)
        return rows.mT if self.direct else Q.mT.contiguous().mT

    def project(self, W: Tensor, stop: int, start: int = 0) -> Tensor:
        """``W -= V H`` in place, with ``H = V^H W`` of columns ``start`` to ``stop``."""
        parts = [self.space.share_of_inner(V, W) for _, V in self._groups(start, stop)]
        empty = torch.zeros(0, W.shape[1], dtype=small_dtype(W.dtype), device=W.device)
        H = self.space.summed(torch.cat([empty, *parts]))
        for columns, V in self._groups(start, stop):
            subtract(W, V, H[columns.start - start : columns.stop - start])
        return H

    def combine(self, Y: Tensor) -> Tensor:
        """``V Y``, new memory (n, p)."""
        X = torch.zeros(Y.shape[1], self.rows.shape[1], dtype=self.dtype, device=self.device).mT
        Y = Y.to(device=self.device, dtype=self.dtype)
        for columns, V in self._groups(0, len(Y)):
            X.addmm_(V, Y[columns])
        return X

    def rotate(self, Y: Tensor) -> None:
        """Replace the first p columns by ``V Y``, Y (j, p), with a quarter of a vector to spare."""
        j, p = Y.shape
        n = self.rows.shape[1]
        Y = Y.mT.to(device=self.rows.device, dtype=self.dtype)
        chunk = max(1024, n // (4 * p))
        rotated = torch.empty(p, min(n, chunk), dtype=self.dtype, device=self.rows.device)
        for start in range(0, n, chunk):
            entries = slice(start, start + chunk)
            old = self.rows[:j, entries].to(self.dtype)
            self.rows[:p, entries] = torch.mm(Y, old, out=rotated[:, : old.shape[1]])

    def _groups(self, start: int, stop: int) -> Iterator[tuple[slice, Tensor]]:
        width = max(1, stop if self.direct else _GROUP)
        for first in range(start, stop, width):
            end = min(first + width, stop)
            yield slice(first, end), self.columns(first, end)
