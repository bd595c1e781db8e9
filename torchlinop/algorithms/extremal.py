"""[θ_min, θ_max] ⊂ [λ_min, λ_max]: the ends of a spectrum from a few Lanczos steps, and bounds."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from torchlinop.algorithms.probes import Probes, refuse_num_matvecs, refuse_seed
from torchlinop.algorithms.result import Result
from torchlinop.algorithms.tridiagonal import LanczosTridiag, lanczos_tridiagonal
from torchlinop.errors import DefinitenessError
from torchlinop.operators.base import CurvatureOperator

_MISSED = 0.01  # probability that a bound does not hold
_NOISE = 50  # roundings in an eigenvalue


@dataclass(frozen=True, repr=False)
class ExtremalEigenvalues(Result):
    """The smallest and largest eigenvalue from inside, and bounds from outside.

    ``smallest_bound ≤ λ_min ≤ smallest`` and ``largest ≤ λ_max ≤ largest_bound``: the inner ones
    always, each outer one with probability 0.99 over the random start. Unpacks as
    ``smallest, largest``.
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

    _columns: ClassVar[tuple[str, ...]] = ()

    def __iter__(self) -> Iterator[float]:
        return iter((self.smallest, self.largest))

    def __repr__(self) -> str:
        return (
            f"ExtremalEigenvalues  smallest {self.smallest:.6g} (residual "
            f"{self.smallest_residual:.1e}), largest {self.largest:.6g} (residual "
            f"{self.largest_residual:.1e}) | bounds [{self.smallest_bound:.6g}, "
            f"{self.largest_bound:.6g}] | {self.matvecs} matvecs | seed {self.seed}"
        )


def extremal_eigenvalues(
    op: CurvatureOperator, num_matvecs: int = 20, *, seed: int = 0
) -> ExtremalEigenvalues:
    """Bracket the spectrum of A by ``num_matvecs`` Lanczos steps, from inside and from outside.

    The bounds are ``θ + ε (λ_max - λ_min)`` with ``ε = (log(1.648 √n / 0.01) / (2m - 1))²`` after
    m steps from a random start (Kuczyński and Woźniakowski, SIAM J. Matrix Anal. Appl. 13, 1992,
    theorem 4.2, for A shifted), infinite where m is too small for them; exact where the Krylov
    space became invariant. Keeps ``num_matvecs + 1`` vectors.

    Raises:
        OptionError: fewer than one product; NonFiniteError: a product holds NaN or infinity.
    """
    start = time.perf_counter()
    refuse_num_matvecs(num_matvecs)
    refuse_seed(seed)
    T = _lanczos(op, num_matvecs, seed)
    theta, Y = torch.linalg.eigh(T.matrix())
    low, high = float(theta[0]), float(theta[-1])
    noise = _NOISE * torch.finfo(op.dtype).eps * max(abs(low), abs(high))
    low_residual, high_residual = (
        max(T.residual_norm * abs(float(Y[-1, i])), noise) for i in (0, -1)
    )
    beyond = noise + _beyond(T, op.size, high - low)
    return ExtremalEigenvalues(
        low,
        high,
        low - beyond,
        high + beyond,
        low_residual,
        high_residual,
        T.matvecs,
        op.size,
        seed,
        op.dtype,
        time.perf_counter() - start,
    )


@dataclass(frozen=True, repr=False)
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

    _columns: ClassVar[tuple[str, ...]] = ()

    def __float__(self) -> float:
        return self.estimate

    def __repr__(self) -> str:
        return (
            f"ConditionNumber  {self.estimate:.6g} (at most {self.upper:.6g}) = {self.largest:.6g} "
            f"/ {self.smallest:.6g} | {self.matvecs} matvecs | seed {self.seed}"
        )


def condition_number(
    op: CurvatureOperator, num_matvecs: int = 100, *, seed: int = 0
) -> ConditionNumber:
    """Estimate ``λ_max / λ_min`` of A > 0 by ``num_matvecs`` Lanczos steps.

    Infinite where the smallest Ritz value is zero to rounding. Small eigenvalues need many steps,
    about as many as conjugate gradients. Keeps ``num_matvecs + 1`` vectors.

    Raises:
        DefinitenessError: A has a negative eigenvalue: that of least size is then inside the
            spectrum, where products do not lead.
        OptionError: fewer than one product; NonFiniteError: a product holds NaN or infinity.
    """
    ends = extremal_eigenvalues(op, num_matvecs, seed=seed)
    noise = _NOISE * torch.finfo(op.dtype).eps * ends.largest
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
        seed,
        op.dtype,
        ends.seconds,
    )


def _lanczos(op: CurvatureOperator, steps: int, seed: int) -> LanczosTridiag:
    v0 = Probes(op.space, "sphere", seed, 0).columns(0, 1)[:, 0]
    return lanczos_tridiagonal(op, v0, min(steps, op.size))


def _beyond(T: LanczosTridiag, n: int, seen: float) -> float:
    """How far the spectrum may go on, of which this range was seen: ``ε seen / (1 - 2ε)``."""
    if T.residual_norm == 0 or T.iterations == n:
        return 0.0
    root = math.log(1.648 * n**0.5 / _MISSED) / (2 * T.iterations - 1)
    return root**2 * seen / (1 - 2 * root**2) if root**2 < 0.5 else math.inf
