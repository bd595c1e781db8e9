"""``f(A) b ≈ ‖b‖ V f(T) e₁``: a function of a symmetric matrix times vectors, by Lanczos."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from torchlinop.algorithms.node_values import ScalarFunction, values_at
from torchlinop.algorithms.products import Products
from torchlinop.algorithms.result import Result
from torchlinop.algorithms.right_hand_sides import right_hand_sides
from torchlinop.algorithms.three_term import ThreeTermRecurrence, Tridiagonal
from torchlinop.errors import OptionError
from torchlinop.operators.base import CurvatureOperator

_BETWEEN_LOOKS = 5  # steps: the error of step m − 5 is estimated by what the last five changed
_ROUNDING = 4  # roundoffs of ‖x‖, below which no change can be seen


@dataclass(frozen=True)
class FunctionResult(Result):
    """``f(A) b`` for one or several b."""

    _columns = ("error_estimates", "converged")

    x: Tensor  # (n,) or (n, k), as b
    error_estimates: Tensor  # (k,) of ‖x − f(A) b‖: what five steps changed, plus rounding
    converged: Tensor  # (k,) bool: the estimate is at most rtol ‖x‖
    rtol: float
    steps: int
    matvecs: int
    dtype: torch.dtype  # of x; products are in that of the operator
    seconds: float
    warnings: tuple[str, ...]

    def __repr__(self) -> str:
        reached = int(self.converged.sum())
        dtype = str(self.dtype).removeprefix("torch.")
        lines = [
            f"FunctionResult  {reached} of {len(self.converged)} converged | {self.steps} steps | "
            f"{self.matvecs} matvecs | {self.seconds:.2g} s | {dtype}",
            f"  largest error estimate {float(self.error_estimates.max()):.1e}, "
            f"asked {self.rtol:.1e} of the norm",
            f"  warnings: {'; '.join(self.warnings) or 'none'}",
        ]
        return "\n".join(lines)


def apply_function(
    op: CurvatureOperator,
    f: ScalarFunction,
    b: Tensor,
    steps: int = 100,
    *,
    rtol: float | None = None,
    keep_basis: bool = True,
) -> FunctionResult:
    """``f(A) b`` for a vector (n,) or every column of a block (n, k).

    ``f`` acts on a float64 tensor of Ritz values, entry by entry: ``torch.exp``, or
    ``lambda t: t.abs().sqrt()``. It must be smooth on the whole interval of the spectrum for few
    steps to do. Stops when five steps change the result by less than ``rtol`` (√eps of the
    operator's dtype) of its norm, at the latest after ``steps``. This is an estimate of the error
    five steps before, usually a cautious one, and not a bound: a plateau deceives it.

    Costs ``steps`` products of width k and memory for ``steps`` blocks; ``keep_basis=False`` needs
    three blocks and multiplies twice, for a second pass over the same vectors.

    Raises:
        OptionError: no step allowed, or a negative tolerance.
        VectorError: b is no vector of this space, or f does not act entrywise.
        NonFiniteError: f is not finite at a Ritz value, or products are not.

    Source: Saad, SIAM J. Numer. Anal. 29 (1992); without reorthogonalisation: Musco, Musco and
    Sidford, SODA 2018.
    """
    start = time.perf_counter()
    A = Products(op)
    rtol = torch.finfo(op.dtype).eps ** 0.5 if rtol is None else rtol
    if steps < 1 or not rtol >= 0:
        raise OptionError(
            f"expected steps to be at least 1 and rtol not negative, got steps={steps} and "
            f"rtol={rtol}; leave them out for 100 and √eps"
        )
    B = right_hand_sides(A, b)
    norms = A.norms(B)
    V = B / norms.where(norms > 0, 1.0).to(B.dtype)
    recurrence = ThreeTermRecurrence(A, V)
    basis: list[Tensor] = []
    last = min(steps, op.size)
    for step in range(1, last + 1):
        v = recurrence.advance()
        if keep_basis:
            basis.append(v)
        if step % _BETWEEN_LOOKS == 0 or step == last:
            coefficients, changes = _coefficients(recurrence.tridiagonals(), f, step, A.noise)
            sizes = norms.cpu() * torch.linalg.vector_norm(coefficients, dim=0)
            errors = norms.cpu() * torch.linalg.vector_norm(changes, dim=0)
            errors += _ROUNDING * torch.finfo(op.dtype).eps * sizes
            converged = errors <= rtol * sizes
            if converged.all():
                break
    vectors = iter(basis) if keep_basis else _again(A, V)
    X = torch.zeros_like(B)
    for v, c in zip(islice(vectors, step), coefficients.to(B.device), strict=True):
        X.addcmul_(v, (norms * c).to(B.dtype))
    warnings = (
        ()
        if converged.all()
        else (f"{int((~converged).sum())} columns not converged after {step} steps; raise steps",)
    )
    seconds = time.perf_counter() - start
    return FunctionResult(
        X.reshape(b.shape), errors, converged, rtol, step, A.matvecs, X.dtype, seconds, warnings
    )


def _again(A: Products, V: Tensor) -> Iterator[Tensor]:
    """The Lanczos vectors a second time."""
    recurrence = ThreeTermRecurrence(A, V)
    while True:
        yield recurrence.advance()


def _coefficients(
    tridiagonals: list[Tridiagonal], f: ScalarFunction, steps: int, noise: float
) -> tuple[Tensor, Tensor]:
    """``f(T) e₁`` of every column, (steps, k), and how the last few steps changed it.

    Entries after an exhausted Krylov space are zero, and so is the change: the result is exact.
    """
    columns = torch.zeros(steps, len(tridiagonals), dtype=torch.float64)
    changes = torch.zeros_like(columns)
    for column, change, T in zip(columns.mT, changes.mT, tridiagonals, strict=True):
        column[: T.steps] = _first_column(f, T, noise)
        if not T.exhausted:
            change.copy_(column)
            earlier = T.leading(max(T.steps - _BETWEEN_LOOKS, T.steps // 2, 1))
            change[: earlier.steps] -= _first_column(f, earlier, noise)
    return columns, changes


def _first_column(f: ScalarFunction, T: Tridiagonal, noise: float) -> Tensor:
    first_column: Tensor = T.Y @ (values_at(f, T.nodes, noise) * T.Y[0])
    return first_column
