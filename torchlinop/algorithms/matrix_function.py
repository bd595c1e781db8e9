"""``f(A) b ≈ ‖b‖ V f(T) e₁``: a function of a symmetric matrix times vectors, by Lanczos."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from torchlinop.algorithms.early_stop import announced
from torchlinop.algorithms.given_operator import refuse_no_operator, refuse_no_tensor
from torchlinop.algorithms.node_values import ScalarFunction, values_at
from torchlinop.algorithms.products import Products
from torchlinop.algorithms.result import Result
from torchlinop.algorithms.right_hand_sides import right_hand_sides
from torchlinop.algorithms.sizes import refuse_fractions, refuse_non_numbers
from torchlinop.algorithms.symmetric_run import symmetric_run
from torchlinop.algorithms.three_term import ThreeTermRecurrence, Tridiagonal, tridiagonals
from torchlinop.dtypes import name_of
from torchlinop.errors import OptionError, VectorError
from torchlinop.operators.base import CurvatureOperator

_BETWEEN_LOOKS = 5  # steps: the error of step m − 5 is estimated by what the last five changed
_PLATEAU = 0.95  # no slower convergence is extrapolated
_ROUNDING = 4  # roundoffs of ‖x‖, below which no change can be seen


@dataclass(frozen=True, eq=False)
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
        dtype = name_of(self.dtype)
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
    max_seconds: float = math.inf,
    progress: bool = False,
) -> FunctionResult:
    """``f(A) b`` for a vector (n,) or every column of a block (n, k).

    ``f`` acts on a float64 tensor of Ritz values, entry by entry: ``torch.exp``, or
    ``lambda t: t.abs().sqrt()``. It must be smooth on the whole interval of the spectrum for few
    steps to do. Stops when five steps change the result by less than ``rtol`` (√eps of the
    operator's dtype) of its norm, at the latest after ``steps``. This is an estimate of the error
    five steps before, extrapolated where convergence is slow, and not a bound: a plateau deceives
    it. What rounding of eigenvalues does to f is added.

    Costs ``steps`` products of width k and memory for ``steps`` blocks; ``keep_basis=False`` needs
    three blocks and multiplies twice, for a second pass over the same vectors. Ctrl-C, or the end
    of ``max_seconds``, in the first pass returns what its steps give. A warning counts the columns
    that are not converged. ``progress`` shows a bar, on a terminal.

    Raises:
        OptionError: no step allowed, or a negative tolerance.
        VectorError: b is no vector of this space, or f does not act entrywise.
        NonFiniteError: f is not finite at a Ritz value, or products are not; SymmetryError: A is
            not symmetric, or its products do not repeat.
        MemoryEstimateError: memory ran out.

    Source: Saad, SIAM J. Numer. Anal. 29 (1992); without reorthogonalisation: Musco, Musco and
    Sidford, SODA 2018.
    """
    refuse_no_operator(op)
    rtol = torch.finfo(op.dtype).eps ** 0.5 if rtol is None else rtol
    refuse_no_tensor("b", b)
    if not callable(f):
        raise OptionError(
            f"expected f to be a function of a tensor, got {f!r}; pass torch.exp, say"
        )
    refuse_fractions(steps=steps)
    refuse_non_numbers(rtol=rtol)
    if steps < 1 or not rtol >= 0:
        raise OptionError(
            f"expected steps to be at least 1 and rtol not negative, got steps={steps} and "
            f"rtol={rtol}; leave them out for 100 and √eps"
        )
    last, width = min(steps, op.size), b.shape[1] if b.ndim > 1 else 1
    if not width:
        raise VectorError(
            f"expected b to have at least one column, got {tuple(b.shape)}; pass a vector (n,), say"
        )
    with symmetric_run(op, total=width * last, max_seconds=max_seconds, progress=progress) as A:
        B, units = right_hand_sides(A, b)
        norms = A.norms(B)
        V = B / norms.where(norms > 0, 1.0).to(B.dtype)
        lanczos = _FirstPass(A, V, f, rtol, keep_basis)
        ended = lanczos.run(last)
        C, errors, converged, exhausted = lanczos.look()
        vectors = iter(lanczos.basis) if keep_basis else _again(A, V)
        X = torch.zeros_like(B)
        for v, c in zip(islice(vectors, len(C)), C.to(B.device), strict=True):
            X.addcmul_(v, (norms * c).to(B.dtype))
        result = FunctionResult(
            (X * units.to(X)).reshape(b.shape),
            errors * norms.cpu() * units,
            converged,
            rtol,
            len(C),
            A.matvecs,
            X.dtype,
            A.seconds,
            _warnings(ended, converged, exhausted, len(C)),
        )
    return announced(result)


class _Look(NamedTuple):
    """What Lanczos coefficients say of every column."""

    C: Tensor  # (steps, k) ``f(T) e₁``
    errors: Tensor  # (k,) estimated, for b of norm one
    converged: Tensor  # (k,) bool
    exhausted: Tensor  # (k,) bool: the Krylov space is invariant, and further steps are zero


class _FirstPass:
    """Lanczos from the columns of V, and what its coefficients say of ``f(A) V``."""

    def __init__(
        self, A: Products, V: Tensor, f: ScalarFunction, rtol: float, keep_basis: bool
    ) -> None:
        self.A, self.f, self.rtol, self.keep_basis = A, f, rtol, keep_basis
        self.recurrence = ThreeTermRecurrence(A, V)
        self.basis: list[Tensor] = []

    def run(self, last: int) -> str:
        """Until no column gains by more; the word for what ended it before, or none."""
        try:
            for step in range(1, last + 1):
                v = self.recurrence.advance()
                if self.keep_basis:
                    self.basis.append(v)
                if step % _BETWEEN_LOOKS == 0:
                    seen = self.look()
                    if (seen.converged | seen.exhausted).all():
                        return ""
                if self.A.late and step < last:
                    return "out of time"
        except KeyboardInterrupt:
            if not self._steps:
                raise
            return "interrupted"
        return ""

    @property
    def _steps(self) -> int:
        return len(self.basis) if self.keep_basis else self.recurrence.steps

    def look(self) -> _Look:
        """At the steps so far. Waits for the device."""
        alphas, betas = self.recurrence.coefficients()
        Ts = tridiagonals((alphas[: self._steps], betas[: self._steps]))
        C = torch.zeros(self._steps, len(Ts), dtype=torch.float64)
        errors = torch.zeros(len(Ts), dtype=torch.float64)
        for i, T in enumerate(Ts):
            C[: T.steps, i] = _first_column(self.f, T, self.A.noise)
            errors[i] = _change(self.f, T, C[:, i], self.A.noise)
            errors[i] += _rounding(self.f, T, torch.finfo(self.A.operator.dtype).eps, self.A.noise)
        sizes = torch.linalg.vector_norm(C, dim=0)
        errors = errors.where(sizes > 0, 0.0)
        everything = self._steps == self.A.operator.size
        exhausted = torch.tensor([T.exhausted or everything for T in Ts], dtype=torch.bool)
        return _Look(C, errors, errors <= self.rtol * sizes, exhausted)


def _again(A: Products, V: Tensor) -> Iterator[Tensor]:
    """The Lanczos vectors a second time."""
    recurrence = ThreeTermRecurrence(A, V)
    while True:
        yield recurrence.advance()


def _first_column(f: ScalarFunction, T: Tridiagonal, noise: float) -> Tensor:
    first_column: Tensor = T.Y @ (values_at(f, T.nodes, noise) * T.Y[0])
    return first_column


def _change(f: ScalarFunction, T: Tridiagonal, column: Tensor, noise: float) -> Tensor:
    """What five steps changed, or what the rate of the last third leaves to change, if more.

    Nothing where the Krylov space is exhausted.
    """
    if T.exhausted:
        return column.new_zeros(())
    five, rate = _changes(f, T, column, _BETWEEN_LOOKS, noise)
    third, rate_of_third = _changes(f, T, column, T.steps // 3, noise)
    later = torch.maximum(five * rate / (1 - rate), third * rate_of_third / (1 - rate_of_third))
    return torch.maximum(five, later)


def _changes(
    f: ScalarFunction, T: Tridiagonal, column: Tensor, lag: int, noise: float
) -> tuple[Tensor, Tensor]:
    """What as many steps changed, and its ratio to what as many steps before changed."""
    lag = min(lag, max(1, (T.steps - 1) // 2)) or 1
    columns = torch.zeros(3, len(column), dtype=torch.float64)
    columns[0, : T.steps] = column[: T.steps]
    for i, steps in ((1, T.steps - lag), (2, T.steps - 2 * lag)):
        if steps > 0:
            columns[i, :steps] = _first_column(f, T.leading(steps), noise)
    change, before = torch.linalg.vector_norm(columns.diff(dim=0), dim=1)
    return change, (change / before).nan_to_num(0.0).clamp_max(_PLATEAU)


def _rounding(f: ScalarFunction, T: Tridiagonal, eps: float, noise: float) -> Tensor:
    """What a few roundoffs change: of the result, and of eigenvalues, which f may amplify."""
    values = values_at(f, T.nodes, noise)
    shift = _ROUNDING * eps * T.nodes.abs().max()
    moved = values_at(f, T.nodes + shift, noise) - values
    norms: Tensor = torch.linalg.vector_norm(
        torch.stack([_ROUNDING * eps * values, moved]) * T.Y[0]
    )
    return norms


def _warnings(ended: str, converged: Tensor, exhausted: Tensor, steps: int) -> tuple[str, ...]:
    if converged.all():
        return ()
    missing = f"{int((~converged).sum())} columns not converged after {steps} steps"
    if (converged | exhausted).all():
        return (f"{missing}, which are all there are: rounding forbids more. Raise rtol",)
    return (f"{ended}: {missing}" if ended else f"{missing}; raise steps",)
