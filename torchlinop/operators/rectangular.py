"""A rectangular matrix known by its products and those of its transpose."""

from __future__ import annotations

import numbers
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from torchlinop.dtypes import name_of
from torchlinop.operators.product import dense, of_block, of_vector
from torchlinop.space import VectorSpace


class RectangularOperator(ABC):
    """A real matrix A of shape (m, n): ``V ↦ A V`` and ``U ↦ Aᵀ U``.

    A subclass writes ``_matmat`` and ``_rmatmat``.
    """

    def __init__(
        self, rows: VectorSpace, space: VectorSpace, *, description: Sequence[str] = ()
    ) -> None:
        self.rows = rows  # (m,), where A v lives
        self.space = space  # (n,), where v lives
        self.description = tuple(description)

    @abstractmethod
    def _matmat(self, V: Tensor) -> Tensor:
        """A V (m, k) for a block (n, k), as fresh memory."""

    @abstractmethod
    def _rmatmat(self, U: Tensor) -> Tensor:
        """Aᵀ U (n, k) for a block (m, k), as fresh memory."""

    @property
    def shape(self) -> tuple[int, int]:
        return (self.rows.size, self.space.size)

    @property
    def dtype(self) -> torch.dtype:
        return self.space.dtype

    @property
    def device(self) -> torch.device:
        return self.space.device

    def matmat(self, V: Tensor) -> Tensor:
        """A V (m, k) for a block (n, k). Raises VectorError for anything else."""
        return of_block(self._matmat, self.space, self.rows.size, V)

    def matvec(self, v: Tensor) -> Tensor:
        """A v (m,) for a vector (n,). Raises VectorError for anything else."""
        return of_vector(self._matmat, self.space, self.rows.size, v)

    def rmatmat(self, U: Tensor) -> Tensor:
        """Aᵀ U (n, k) for a block (m, k). Raises VectorError for anything else."""
        return of_block(self._rmatmat, self.rows, self.space.size, U)

    def rmatvec(self, u: Tensor) -> Tensor:
        """Aᵀ u (n,) for a vector (m,). Raises VectorError for anything else."""
        return of_vector(self._rmatmat, self.rows, self.space.size, u)

    def __matmul__(self, other: Tensor) -> Tensor:
        if not isinstance(other, Tensor):
            return NotImplemented
        return self.matvec(other) if other.ndim == 1 else self.matmat(other)

    @property
    def T(self) -> RectangularOperator:  # noqa: N802  # as everywhere
        """Aᵀ."""
        return Transpose(self)

    def __mul__(self, factor: float) -> RectangularOperator:
        if not isinstance(factor, numbers.Real):
            return NotImplemented
        return Multiple(float(factor), self)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> RectangularOperator:
        if not isinstance(divisor, numbers.Real):
            return NotImplemented
        return self * (1 / float(divisor))

    def __neg__(self) -> RectangularOperator:
        return self * -1.0

    def to_dense(self, chunk: int = 256) -> Tensor:
        """The matrix itself, (m, n), by products with A or Aᵀ, whichever has fewer columns."""
        m, n = self.shape
        if m < n:
            return dense(self.rmatmat, self.rows, n, chunk).mT
        return dense(self.matmat, self.space, m, chunk)

    def __repr__(self) -> str:
        m, n = self.shape
        facts = [
            f"{type(self).__name__} {m:,}x{n:,} {name_of(self.dtype)} {self.device}",
            *self.description,
        ]
        return f"<{' | '.join(facts)}>"


class Multiple(RectangularOperator):
    """``a A`` for a real a."""

    def __init__(self, factor: float, operator: RectangularOperator) -> None:
        super().__init__(
            operator.rows, operator.space, description=[f"{factor:g} times {operator!r}"]
        )
        self.factor = factor
        self.operator = operator

    def _matmat(self, V: Tensor) -> Tensor:
        return self.operator.matmat(V).mul_(self.factor)

    def _rmatmat(self, U: Tensor) -> Tensor:
        return self.operator.rmatmat(U).mul_(self.factor)


class Transpose(RectangularOperator):
    """The transpose of a rectangular operator."""

    def __init__(self, operator: RectangularOperator) -> None:
        super().__init__(operator.space, operator.rows, description=[f"of {operator!r}"])
        self.operator = operator

    def _matmat(self, V: Tensor) -> Tensor:
        return self.operator.rmatmat(V)

    def _rmatmat(self, U: Tensor) -> Tensor:
        return self.operator.matmat(U)

    @property
    def T(self) -> RectangularOperator:  # noqa: N802
        return self.operator
