"""Products in the operator's dtype, long vectors in at least float32, scalars in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchlinop.algorithms.basis import inner
from torchlinop.algorithms.products import breakdown, multiply, working_dtype
from torchlinop.errors import NonFiniteError, OptionError, VectorError
from torchlinop.operators.base import CurvatureOperator


class WorkingPrecision:
    """``A + damping I`` and inner products, in the precision a recurrence needs.

    The vectors of a three-term recurrence lose everything if rounded to half precision: those of
    a bfloat16 operator are kept in float32 and rounded on their way into a product only.
    """

    def __init__(self, op: CurvatureOperator, damping: float = 0.0) -> None:
        if not math.isfinite(damping):
            raise OptionError(f"expected a finite damping, got {damping}; pass damping=1e-3, say")
        self.op = op
        self.damping = damping
        self.dtype = working_dtype(op.dtype)
        self.eps = torch.finfo(self.dtype).eps
        self.noise = breakdown(op.dtype)  # what products do to eigenvalues, relative to ‖A‖
        self.matvecs = 0

    def multiply(self, V: Tensor) -> Tensor:
        """``A V + damping V`` (n, k), in memory of its own."""
        self.matvecs += V.shape[1]
        AV = multiply(self.op, V)
        return AV.add_(V, alpha=self.damping) if self.damping else AV

    def dots(self, X: Tensor, Y: Tensor) -> Tensor:
        """``⟨x_i, y_i⟩`` of every column, (k,)."""
        return inner(self.op.space, X, Y).diagonal().real

    def norms(self, X: Tensor) -> Tensor:
        """``‖x_i‖`` of every column, (k,)."""
        return self.op.space.norm(X).double()

    def right_hand_sides(self, b: Tensor) -> Tensor:
        """A block (n, k) in working precision of a vector (n,) or block.

        Raises:
            VectorError: wrong shape, dtype or device; NonFiniteError: NaN or infinite entries.
        """
        n, space = self.op.size, self.op.space
        if b.ndim not in (1, 2) or b.shape[0] != n:
            raise VectorError(
                f"expected b of shape ({n},) or ({n}, k), got {tuple(b.shape)}; "
                "pass right-hand sides as columns"
            )
        if b.dtype not in (space.dtype, self.dtype) or b.device != space.device:
            raise VectorError(
                f"expected b in {space.dtype} on {space.device}, got {b.dtype} on {b.device}; "
                f"pass b.to({space.dtype}, device={str(space.device)!r})"
            )
        B = b.detach().reshape(n, -1).to(self.dtype)
        if not torch.isfinite(self.norms(B)).all():
            raise NonFiniteError("b has NaN or infinite entries; clean it before the solve")
        return B


def refuse_non_finite(scalars: Tensor, A: WorkingPrecision) -> None:
    """Raise NonFiniteError if a recurrence met NaN or infinity."""
    if not torch.isfinite(scalars).all():
        raise NonFiniteError(
            f"a product of {A.op!r} is NaN or infinite, in the first {A.matvecs} products; "
            "op.check() says more"
        )
