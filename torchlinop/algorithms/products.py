"""Products in working precision, counted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchlinop.operators.base import CurvatureOperator


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a solver's vectors: that of the operator, and float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def roundoff(dtype: torch.dtype) -> float:
    """What products of this dtype are off by, relative to ‖A‖.

    Half precision rounds every entry by up to eps / 2; the errors of many entries average.
    """
    return max(torch.finfo(working_dtype(dtype)).eps, torch.finfo(dtype).eps / 16)


def breakdown(dtype: torch.dtype) -> float:
    """A residual of this length, relative to ‖A‖, is rounding error and no direction."""
    return max(50 * torch.finfo(working_dtype(dtype)).eps, 2 * roundoff(dtype))


def multiply(op: CurvatureOperator, V: Tensor) -> Tensor:
    """A V (n, k) in the dtype of V, which may be finer than that of the operator."""
    return op.matmat(V.to(op.dtype)).to(V.dtype)


class Products:
    """``V ↦ A V`` for blocks in working precision, of an operator of any dtype."""

    def __init__(
        self, operator: CurvatureOperator, notify: Callable[[int], object] = lambda columns: None
    ) -> None:
        self.operator = operator
        self.matvecs = 0
        self.matmats = 0
        self._notify = notify

    def __call__(self, V: Tensor) -> Tensor:
        """``A V`` (n, w) as fresh memory, its columns contiguous."""
        rows = multiply(self.operator, V).mT.contiguous()
        self.count(V.shape[1])
        # The strides of a single row are arbitrary, and copies are slow by some: a view sets them.
        return rows.view(rows.shape).mT

    def count(self, columns: int, calls: int = 1) -> None:
        """Note products taken elsewhere."""
        self.matvecs += columns
        self.matmats += calls
        self._notify(columns)
