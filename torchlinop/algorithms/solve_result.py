"""Solutions of ``(A + damping I) x = b`` with their true residuals, and what to do about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchlinop.algorithms.result import Result
from torchlinop.dtypes import name_of

Status = Literal[
    "converged", "stagnated", "indefinite", "singular", "max_iter", "maxseconds", "interrupted"
]


@dataclass(frozen=True, eq=False)
class SolveResult(Result):
    """One solution a column. All but x and directions is on the CPU, in float64.

    Status: ``"converged"``; ``"stagnated"``: rounding or noise of the products forbid to go on;
    ``"indefinite"``: conjugate gradients met a direction of curvature ≤ 0 (within rounding), in
    ``directions``; ``"singular"``: the residual is orthogonal to the range of the matrix, up to
    10 √eps ``‖A‖ ‖r‖``, so that x is about a solution of least squares; ``"max_iter"``,
    ``"maxseconds"`` and ``"interrupted"`` (by Ctrl-C): it was stopped.
    """

    _columns = ("residual_norms", "relative_residuals", "converged", "iterations")

    x: Tensor  # (n,) or (n, k), as b
    residual_norms: Tensor  # (k,) ‖b − (A + damping I) x‖, by a product with x
    relative_residuals: Tensor  # (k,) the same over ‖b‖; 0 for b = 0
    converged: Tensor  # (k,) bool: the relative residual is at most rtol
    iterations: Tensor  # (k,) int64
    status: tuple[Status, ...]  # (k,)
    directions: Tensor | None  # as x: unit p with pᵀ (A + damping I) p ≤ 0, or zero
    curvatures: Tensor  # (k,) that quotient, NaN where there is no such direction
    rtol: float
    damping: float
    method: str
    matvecs: int
    dtype: torch.dtype  # of x
    seconds: float
    warnings: tuple[str, ...]

    def __repr__(self) -> str:
        k = len(self.status)
        worst = int(self.relative_residuals.argmax())
        dtype = name_of(self.dtype)
        lines = [
            f"SolveResult  {int(self.converged.sum())} of {k} converged | {self.method} | damping "
            f"{self.damping:g} | {int(self.iterations.max())} iterations | {self.matvecs} matvecs "
            f"| {self.seconds:.2g} s | {dtype}",
            f"  largest residual {float(self.relative_residuals[worst]):.1e} of the norm of b "
            f"(column {worst}, {self.status[worst]}), asked {self.rtol:.1e}",
            f"  warnings: {'; '.join(self.warnings) or 'none'}",
        ]
        return "\n".join(lines)


_ADVICE: dict[Status, str] = {
    "stagnated": "Rounding forbids more: raise rtol or damping, or use a finer dtype",
    "indefinite": 'the matrix is not positive definite: raise damping, or use method="minres"',
    "singular": "The vector b is not in the range of the matrix: raise damping",
    "interrupted": "It was interrupted: the columns hold what there was",
    "maxseconds": "Raise max_seconds, or pass a preconditioner",
    "max_iter": "Raise max_iter or damping, or pass a preconditioner",
}


def advice(
    status: list[Status], relative_residuals: Tensor, rtol: float, matvecs: int
) -> tuple[str, ...]:
    """What is wrong with the worst column, and one thing to do; nothing if all are converged."""
    failed = [i for i, s in enumerate(status) if s != "converged"]
    if not failed:
        return ()
    worst = max(failed, key=lambda i: float(relative_residuals[i]))
    return (
        f"{len(status) - len(failed)} of {len(status)} systems reached rtol={rtol:.1e} after "
        f"{matvecs} products; worst residual {float(relative_residuals[worst]):.1e} of ‖b‖ "
        f"(column {worst}, {status[worst]}). {_ADVICE[status[worst]]}",
    )
