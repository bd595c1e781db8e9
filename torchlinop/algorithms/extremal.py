"""[θ_min, θ_max] ⊂ [λ_min, λ_max]: the ends of a spectrum from a few Lanczos steps, and bounds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, TypedDict, Unpack

import torch

from torchlinop.algorithms.early_stop import announced, notes, taken
from torchlinop.algorithms.given_operator import refuse_no_operator
from torchlinop.algorithms.probes import Probes, checked_seed, refuse_num_matvecs
from torchlinop.algorithms.products import Products, breakdown, roundoff
from torchlinop.algorithms.result import Result
from torchlinop.algorithms.symmetric_run import symmetric_run
from torchlinop.algorithms.tridiagonal import LanczosTridiag, Recurrence, start_vector
from torchlinop.algorithms.unit_scale import UnitScale
from torchlinop.choices import refuse_unknown_options
from torchlinop.errors import DefinitenessError
from torchlinop.operators.base import CurvatureOperator

_MISSED = 0.005  # probability that a bound does not hold
ROUNDINGS = 50  # roundings in an eigenvalue


@dataclass(frozen=True, repr=False, eq=False)
class ExtremalEigenvalues(Result):
    """The smallest and largest eigenvalue from inside, and bounds from outside.

    ``smallest_bound ≤ λ_min ≤ smallest`` and ``largest ≤ λ_max ≤ largest_bound``: the inner ones
    always, but for rounding; the outer ones, both, with probability 0.99 over the random start.
    Unpacks as ``smallest, largest``.
    """

    smallest: float
    largest: float
    smallest_bound: float
    largest_bound: float
    smallest_residual: float  # ‖A x - θ x‖: an eigenvalue is so near
    largest_residual: float
    matvecs: int
    operator_size: int
    seed: int
    dtype: torch.dtype
    seconds: float
    warnings: tuple[str, ...] = ()

    _columns: ClassVar[tuple[str, ...]] = ()

    def __iter__(self) -> Iterator[float]:
        return iter((self.smallest, self.largest))

    def __repr__(self) -> str:
        line = (
            f"ExtremalEigenvalues  smallest {self.smallest:.6g} (residual "
            f"{self.smallest_residual:.1e}), largest {self.largest:.6g} (residual "
            f"{self.largest_residual:.1e}) | bounds [{self.smallest_bound:.6g}, "
            f"{self.largest_bound:.6g}] | {self.matvecs} matvecs | seed {self.seed}"
        )
        return "\n".join([line, *(f"  {warning}" for warning in self.warnings)])


def extremal_eigenvalues(
    op: CurvatureOperator,
    num_matvecs: int = 20,
    *,
    seed: int = 0,
    max_seconds: float = math.inf,
    progress: bool = False,
) -> ExtremalEigenvalues:
    """Bracket the spectrum of A by ``num_matvecs`` Lanczos steps, from inside and from outside.

    The bounds are ``θ + ε (λ_max - λ_min)`` with ``ε = (log(1.648 √n / 0.005) / (2m - 1))²`` after
    m steps from a random start (Kuczyński and Woźniakowski, SIAM J. Matrix Anal. Appl. 13, 1992,
    theorem 4.2, for A shifted), infinite where m is too small for them; exact where the Krylov
    space became invariant. Keeps ``num_matvecs + 1`` vectors. Ctrl-C, or ``max_seconds``, returns
    what the steps taken tell; ``progress`` shows a bar on a terminal.

    Raises:
        OptionError: fewer than one product; NonFiniteError: a product holds NaN or infinity.
    """
    return announced(
        bracket(op, num_matvecs, seed=seed, max_seconds=max_seconds, progress=progress)
    )


def bracket(
    op: CurvatureOperator, num_matvecs: int, *, seed: int, max_seconds: float, progress: bool
) -> ExtremalEigenvalues:
    """``extremal_eigenvalues`` without a warning to the caller."""
    refuse_no_operator(op)
    refuse_num_matvecs(num_matvecs)
    seed = checked_seed(seed)
    A = UnitScale(op)
    with symmetric_run(
        A, seed=seed, total=num_matvecs, max_seconds=max_seconds, progress=progress
    ) as products:
        T, stopped = _lanczos(products, min(num_matvecs, op.size), seed)
    theta, Y = torch.linalg.eigh(T.matrix())
    low, high = float(theta[0]), float(theta[-1])
    noise = ROUNDINGS * roundoff(op.dtype) * max(abs(low), abs(high))
    low_residual, high_residual = (
        max(T.residual_norm * abs(float(Y[-1, i])), noise) for i in (0, -1)
    )
    beyond = noise + _beyond(T, op.size, high - low)
    return ExtremalEigenvalues(
        low * A.scale,
        high * A.scale,
        (low - beyond) * A.scale,
        (high + beyond) * A.scale,
        low_residual * A.scale,
        high_residual * A.scale,
        products.matvecs,
        op.size,
        seed,
        op.dtype,
        products.seconds,
        notes(stopped, products, num_matvecs),
    )


class _Options(TypedDict, total=False):
    seed: int
    max_seconds: float
    progress: bool


@dataclass(frozen=True, repr=False, eq=False)
class ConditionNumber(Result):
    """``λ_max / λ_min`` of a positive matrix, at least ``estimate``.

    It is at most ``upper``, infinite while the smallest Ritz value has not converged, if that is
    the smallest eigenvalue's.
    """

    estimate: float
    upper: float
    smallest: float
    largest: float
    matvecs: int
    operator_size: int
    seed: int
    dtype: torch.dtype
    seconds: float
    warnings: tuple[str, ...] = ()

    _columns: ClassVar[tuple[str, ...]] = ()

    def __float__(self) -> float:
        return self.estimate

    def __repr__(self) -> str:
        line = (
            f"ConditionNumber  {self.estimate:.6g} (at most {self.upper:.6g}) = {self.largest:.6g} "
            f"/ {self.smallest:.6g} | {self.matvecs} matvecs | seed {self.seed}"
        )
        return "\n".join([line, *(f"  {warning}" for warning in self.warnings)])


def condition_number(
    op: CurvatureOperator, num_matvecs: int = 100, **options: Unpack[_Options]
) -> ConditionNumber:
    """Estimate ``λ_max / λ_min`` of A > 0 by ``num_matvecs`` Lanczos steps.

    Infinite where the smallest Ritz value is zero to rounding. Small eigenvalues need many steps,
    about as many as conjugate gradients. Keeps ``num_matvecs + 1`` vectors. Keywords are those of
    ``extremal_eigenvalues``: seed, max_seconds, progress.

    Raises:
        DefinitenessError: A has a negative eigenvalue: that of least size is then inside the
            spectrum, where products do not lead.
        OptionError: fewer than one product; NonFiniteError: a product holds NaN or infinity.
    """
    refuse_unknown_options(options, _Options.__optional_keys__)
    ends = extremal_eigenvalues(op, num_matvecs, **options)
    noise = breakdown(op.dtype) * ends.largest
    if ends.smallest < -abs(noise):
        raise DefinitenessError(
            f"{op!r} has an eigenvalue of at most {ends.smallest:.3g}: expected none below zero. "
            "Shift the operator by a damping, op.shift(damping)"
        )
    singular = ends.smallest <= noise
    least = ends.smallest - ends.smallest_residual
    return ConditionNumber(
        math.inf if singular else ends.largest / ends.smallest,
        math.inf if singular or least <= 0 else (ends.largest + ends.largest_residual) / least,
        ends.smallest,
        ends.largest,
        ends.matvecs,
        op.size,
        ends.seed,
        op.dtype,
        ends.seconds,
        ends.warnings,
    )


def _lanczos(products: Products, steps: int, seed: int) -> tuple[LanczosTridiag, str]:
    """The recurrence from a random start, and why it ended before all steps, if it did."""
    op = products.operator
    v0 = Probes(op.space, "sphere", seed, 0).columns(0, 1)[:, 0]
    recurrence = Recurrence(products, start_vector(op, v0), steps, "full", keep_basis=True)
    blocks = _Steps(recurrence)
    stopped = taken(products, iter(blocks), lambda: blocks.taken)
    recurrence.steps = blocks.taken  # of a step that was interrupted, nothing is used
    return recurrence.result(), stopped


class _Steps:
    """The steps of a recurrence, one after the other, until its space is invariant."""

    def __init__(self, recurrence: Recurrence) -> None:
        self._recurrence = recurrence
        self.taken = 0

    def __iter__(self) -> Iterator[None]:
        """Yields before every step."""
        for j in range(self._recurrence.steps):
            yield
            self._recurrence.step(j)
            self.taken = j + 1
            if j & self.taken == 0 and bool((self._recurrence.beta[: self.taken] == 0).any()):
                return


def _beyond(T: LanczosTridiag, n: int, seen: float) -> float:
    """How far the spectrum may go on, of which this range was seen: ``ε seen / (1 - 2ε)``."""
    if T.residual_norm == 0 or T.iterations == n:
        return 0.0
    root = math.log(1.648 * n**0.5 / _MISSED) / (2 * T.iterations - 1)
    return root**2 * seen / (1 - 2 * root**2) if root**2 < 0.5 else math.inf
