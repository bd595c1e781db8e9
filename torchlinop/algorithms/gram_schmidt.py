"""Y = Q R, a column at a time, projected thrice; zero for what has no direction of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinop.algorithms.basis import small_dtype, subtract
from torchlinop.algorithms.column_buffer import ColumnBuffer
from torchlinop.space import VectorSpace

# "Twice is enough" (Parlett 1980, section 6.9) for columns that are independent of Q. What is left
# of others is rounding error, as large in Q's span as Q is not quite orthonormal: without a third
# projection, a sketch that goes on beyond the numerical rank loses orthogonality by a factor a
# column. Where the third still shortens it, no direction can be made of the column.
_PROJECTIONS = 3
_LEFT = 0.5


class OrthonormalColumns(ColumnBuffer):
    """Q (n, size), whose columns are orthonormal or zero, and which grows.

    Zero columns need no special case where Q only enters through Q Qᵀ. Nothing is read back from
    the device. Memory: one vector a column; ``capacity`` columns are allocated at once.
    """

    def __init__(self, space: VectorSpace, capacity: int = 0) -> None:
        super().__init__(space, capacity)
        self._space = space

    @property
    def Q(self) -> Tensor:  # noqa: N802
        """The columns (n, size), a view."""
        return self.columns

    def extend(self, Y: Tensor) -> Tensor:
        """Append the directions of Y (n, k); R (size, k) with ``Y = Q R``.

        The last k rows of R are upper triangular. Small pivots stay what they are: a threshold
        here would bias the estimates of traces.
        """
        old, k = self.size, Y.shape[1]
        self.reserve(old + k)
        R = torch.zeros(old + k, k, dtype=small_dtype(Y.dtype), device=Y.device)
        for i in range(k):
            self._extend(Y[:, i : i + 1], R[:, i : i + 1])
        return R

    def project_out(self, G: Tensor, size: int | None = None) -> Tensor:
        """``(I - Q Qᵀ) G`` with the first ``size`` columns of Q, or all of them; new memory."""
        G, Q = G.clone(), self.Q[:, :size]
        for _ in range(2):
            subtract(G, Q, self._space.inner(Q, G))
        return G

    def _extend(self, y: Tensor, r: Tensor) -> None:
        j, Q = self.size, self.Q
        q = self.append(y)
        lengths = []
        for _ in range(_PROJECTIONS):
            h = self._space.inner(Q, q)
            subtract(q, Q, h)
            r[:j] += h
            lengths.append(self._space.norm(q))
        alive = lengths[-1] > _LEFT * lengths[-2]
        q.mul_(torch.where(alive, 1 / lengths[-1], 0.0).to(q.dtype))
        r[j] = torch.where(alive, lengths[-1], 0.0)
