"""v ← A_t v / ‖A_t v‖ with a fresh minibatch's matrix each step: λ of the mean, the noise."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from torchlinop.algorithms.orthogonal import real_dtype
from torchlinop.algorithms.products import Products
from torchlinop.algorithms.result import Result
from torchlinop.algorithms.starting_block import starting_block
from torchlinop.errors import NonFiniteError, OptionError, VectorError
from torchlinop.operators.base import CurvatureOperator
from torchlinop.parameters import ParameterLayout

Operators = Callable[[int], CurvatureOperator] | Sequence[CurvatureOperator]

_FEWEST = 8  # steps, so that there are two to judge by
_LONGEST = 0.4  # tail, so that a fifth of the steps is left for the approach


@dataclass(frozen=True, repr=False)
class StochasticEigenpair(Result):
    """v, and what products that v does not depend on say of it: A is the mean of the matrices."""

    eigenvalue: float  # an unbiased estimate of vᵀ A v
    stderr: float  # of the eigenvalue, over the products that judged
    eigenvector: Tensor  # (n,) unit
    residual_norm: float  # ‖A v − λ v‖ with the noise taken off, 0 where noise hides it
    noise: float  # √E‖A_t v − A v‖²: what one product is off by
    noise_floor: float  # noise over the root of the products that judged: no residual below shows
    momentum: float
    steps: int
    averaged: int  # iterates averaged to v
    judged: int  # products that judged it
    seed: int
    dtype: torch.dtype
    seconds: float
    history: Tensor  # (steps - judged,) float64 v_tᵀ A_t v_t
    layout: ParameterLayout | None

    _columns: ClassVar[tuple[str, ...]] = ()

    def __iter__(self) -> Iterator[float | Tensor]:
        return iter((self.eigenvalue, self.eigenvector))

    @property
    def matvecs(self) -> int:
        return self.steps

    def __repr__(self) -> str:
        hidden = " (hidden by noise)" if self.residual_norm <= self.noise_floor else ""
        return (
            f"StochasticEigenpair  {self.eigenvalue:.6g} +- {self.stderr:.2g} (1 s.e.) | "
            f"{self.steps} matvecs, momentum {self.momentum:g} | seed {self.seed}\n"
            f"  residual {self.residual_norm:.1e}{hidden}, noise floor {self.noise_floor:.1e}, "
            f"noise of a product {self.noise:.1e}"
        )


def stochastic_power_iteration(
    operators: Operators,
    steps: int = 100,
    *,
    momentum: float = 0.0,
    tail: float = 0.25,
    v0: Tensor | None = None,
    seed: int = 0,
) -> StochasticEigenpair:
    """The eigenpair of largest magnitude of A = E A_t, one product with each of ``steps`` A_t.

    Accelerated stochastic power iteration (De Sa et al., AISTATS 2018) with averaging: the
    iterates of a share ``tail`` of the steps are averaged to v, and the last such share are
    products with this v alone. They are independent of it, so that the eigenvalue is an unbiased
    estimate of vᵀ A v, and its standard error means what it says.

    What it does not do: vᵀ A v is below λ₁, by up to residual² / gap, which averaging lessens and
    the standard error does not know of. Iterates do not converge, they stay as far from the
    eigenvector as noise over gap drives them, and their mean need not be the eigenvector of the
    mean: it is the residual that tells, down to the noise floor. Momentum speeds up the approach
    as in `power_iteration_one`, and amplifies the noise: it helps where the variance of the
    matrices is small. Where one product with all data is affordable,
    ``lanczos`` is better by far.

    Args:
        operators: a function of the step, from 0, that returns an operator of a fresh minibatch;
            or a list of operators, of which one is drawn each step, with replacement. Draws have
            to be independent for standard errors to be right.
        steps: how many products, 8 at least.
        momentum: β, in units of A²; best is λ₂²/4, without noise.
        tail: up to 0.4.
        v0: a start (n,); a random one unless given.
        seed: of the start and of the draws from a list.

    Raises:
        OptionError, VectorError: options, v0, or the spaces of the operators do not fit.
        NonFiniteError: a product holds NaN or infinity.

    Example:
        >>> from torchlinop import MatrixOperator
        >>> A = MatrixOperator(torch.diag(torch.tensor([1.0, 5.0], dtype=torch.float64)))
        >>> value, vector = stochastic_power_iteration([0.9 * A, 1.1 * A], steps=400)
        >>> 4.8 < value < 5.2
        True
    """
    started = time.perf_counter()
    _refuse(steps, momentum, tail)
    draws = _Draws(operators, seed)
    first = draws.operator(0)
    share = max(2, round(tail * steps))
    v = starting_block(first, v0, 1, seed)
    iteration = _Iteration(draws, v, momentum)
    iteration.run(steps - 2 * share)
    v = iteration.average(share)
    found = _judged(draws, v, iteration.quotients[-1], steps - share, share)
    return StochasticEigenpair(
        eigenvalue=found.value,
        stderr=found.stderr,
        eigenvector=v[:, 0],
        residual_norm=found.residual,
        noise=found.noise,
        noise_floor=found.noise / share**0.5,
        momentum=momentum,
        steps=steps,
        averaged=share,
        judged=share,
        seed=seed,
        dtype=first.dtype,
        seconds=time.perf_counter() - started,
        history=torch.stack(iteration.quotients).cpu(),
        layout=first.layout,
    )


class _Draws:
    """The operator of every step, all of one space."""

    def __init__(self, operators: Operators, seed: int) -> None:
        self._operators = operators
        self._random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))
        if not callable(operators) and not len(operators):
            raise OptionError("expected at least one operator, got none; pass one a minibatch")
        self._first: CurvatureOperator | None = None

    def operator(self, t: int) -> CurvatureOperator:
        """The operator of step t, asked for in order; the first may be asked for twice."""
        if t == 0 and self._first is not None:
            return self._first
        op = self._drawn(t)
        self._first = self._first or op
        if op.space != self._first.space:
            raise VectorError(
                f"expected operators on one space, got {self._first!r} and {op!r}; "
                "build all from the same parameters, dtype and device"
            )
        return op

    def _drawn(self, t: int) -> CurvatureOperator:
        if callable(self._operators):
            return self._operators(t)
        return self._operators[int(self._random.integers(len(self._operators)))]


class _Iteration:
    """``v₊ ∝ A_t v − β v₋``; the sign of v follows that of its quotient, so that it can settle."""

    def __init__(self, draws: _Draws, v: Tensor, beta: float) -> None:
        self.draws, self.v, self.beta = draws, v, beta
        self.before = torch.zeros_like(v)
        self.quotients: list[Tensor] = []  # () float64, on the device

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def average(self, steps: int) -> Tensor:
        """The direction of the mean of the next iterates."""
        total = torch.zeros_like(self.v)
        for _ in range(steps):
            self.step()
            total += self.v
        return total / self.draws.operator(0).space.norm(total)

    def step(self) -> None:
        op = self.draws.operator(len(self.quotients))
        w = Products(op).columns(self.v)
        quotient = op.space.inner(self.v, w)[0, 0].real
        self.quotients.append(quotient.double())
        w.sub_(self.before, alpha=self.beta)
        scale = torch.where(quotient < 0, -1, 1) / op.space.norm(w)
        self.before = self.v * scale if self.beta else self.before
        self.v = w.mul_(scale)


@dataclass(frozen=True)
class _Judgement:
    """What products with a fixed unit vector say of it."""

    value: float
    stderr: float
    residual: float
    noise: float


def _judged(draws: _Draws, v: Tensor, quotient: Tensor, start: int, count: int) -> _Judgement:
    """Means over the steps from ``start``, of residuals about a rough ``quotient``.

    Of the products themselves, the noise would be a small difference of large numbers.
    """
    space = draws.operator(0).space
    total = torch.zeros_like(v)
    along, squares = [], []
    for t in range(start, start + count):
        r = Products(draws.operator(t)).columns(v)
        r -= v * quotient.to(real_dtype(v))
        along.append(space.inner(v, r)[0, 0].real.double())
        squares.append(space.norm(r).double()[0] ** 2)
        total += r
    mean = total / count
    values = torch.stack(along)
    small = torch.stack(
        [
            quotient + values.mean(),
            values.var() / count,
            torch.stack(squares).sum(),
            space.norm(mean).double()[0] ** 2,
            values.mean() ** 2,
        ]
    )
    value, variance, square, total_square, along_square = small.tolist()
    if not math.isfinite(sum(small.tolist())):
        raise NonFiniteError(
            f"the products of {draws.operator(0)!r} and others hold NaN or infinity; look for "
            "them in the data and the parameters"
        )
    noise = max(0.0, (square - count * total_square) / (count - 1))
    across = total_square - along_square - noise / count
    return _Judgement(value, variance**0.5, max(0.0, across) ** 0.5, noise**0.5)


def _refuse(steps: int, momentum: float, tail: float) -> None:
    if steps < _FEWEST:
        raise OptionError(f"expected steps to be at least {_FEWEST}, got {steps}; take 100, say")
    if not 0 <= momentum < math.inf:
        raise OptionError(
            f"expected momentum to be at least 0, got {momentum}; take λ² / 4 of the second "
            "largest |λ|, or leave it out"
        )
    if not 0 < tail <= _LONGEST:
        raise OptionError(
            f"expected tail above 0 and up to {_LONGEST}, got {tail}; leave it out for 0.25"
        )
