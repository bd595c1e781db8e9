"""v ← A_t v / ‖A_t v‖ with a fresh minibatch's matrix each step: λ of the mean, the noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchlinop.algorithms.fresh_products import Draws, FreshProducts, Operators
from torchlinop.algorithms.orthogonal import real_dtype
from torchlinop.algorithms.probes import checked_seed
from torchlinop.algorithms.products import run_of_products
from torchlinop.algorithms.result import Result
from torchlinop.algorithms.sizes import refuse_fractions, refuse_non_numbers
from torchlinop.algorithms.starting_block import starting_block
from torchlinop.errors import OptionError
from torchlinop.parameters import ParameterLayout

_FEWEST = 8  # steps, so that there are two to judge by
_JUDGES = 2  # products at least, for a standard error
_LONGEST = 0.4  # tail, so that a fifth of the steps is left for the approach


@dataclass(frozen=True, repr=False, eq=False)
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
    status: str  # complete, maxseconds, interrupted
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
        stopped = "" if self.status == "complete" else f" ({self.status})"
        hidden = " (hidden by noise)" if self.residual_norm <= self.noise_floor else ""
        return (
            f"StochasticEigenpair  {self.eigenvalue:.6g} +- {self.stderr:.2g} (1 s.e.) | "
            f"{self.steps} matvecs{stopped}, momentum {self.momentum:g} | seed {self.seed}\n"
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
    max_seconds: float = math.inf,
    progress: bool = False,
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
        max_seconds: after this time, two more products judge what there is, as after Ctrl-C.
        progress: show a bar that counts products, on a terminal.

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
    _refuse(steps, momentum, tail)
    seed = checked_seed(seed)
    draws = Draws(operators, seed)
    share = max(_JUDGES, round(tail * steps))
    v = starting_block(draws.first, v0, 1, seed)
    with run_of_products(
        draws.first, total=steps, max_seconds=max_seconds, progress=progress
    ) as products:
        run = FreshProducts(draws, products)
        iteration = _Iteration(run, v, momentum)
        iteration.advance(steps - 2 * share)
        v, averaged = iteration.average(share)
        found = _judged(run, v, iteration.quotients[-1], share)
    return StochasticEigenpair(
        eigenvalue=found.value,
        stderr=found.stderr,
        eigenvector=v[:, 0],
        residual_norm=found.residual,
        noise=found.noise,
        noise_floor=found.noise / found.products**0.5,
        momentum=momentum,
        steps=products.matvecs,
        averaged=averaged,
        judged=found.products,
        status=run.status,
        seed=seed,
        dtype=draws.first.dtype,
        seconds=products.seconds,
        history=torch.stack(iteration.quotients).cpu(),
        layout=draws.first.layout,
    )


class _Iteration:
    """``v₊ ∝ A_t v − β v₋``; the sign of v follows that of its quotient, so that it can settle."""

    def __init__(self, run: FreshProducts, v: Tensor, beta: float) -> None:
        self.run, self.v, self.beta = run, v, beta
        self.space = run.draws.first.space
        self.before = torch.zeros_like(v)
        self.quotients: list[Tensor] = []  # () float64, on the device

    def advance(self, steps: int) -> None:
        self.run.steps(steps, self.step)

    def average(self, steps: int) -> tuple[Tensor, int]:
        """The direction of the mean of the next iterates, or the last, and of how many it is."""
        total = torch.zeros_like(self.v)
        count = self.run.steps(steps, lambda: total.add_(self.step()))
        if not count:
            return self.v, 1
        return total.div_(self.space.norm(total).to(real_dtype(total))), count

    def step(self) -> Tensor:
        """The next iterate."""
        w = self.run.product(self.v)
        quotient = self.space.inner(self.v, w)[0, 0].real
        self.quotients.append(quotient)
        w.sub_(self.before, alpha=self.beta)
        scale = (torch.where(quotient < 0, -1, 1) / self.space.norm(w)).to(real_dtype(w))
        self.before = self.v * scale if self.beta else self.before
        self.v = w.mul_(scale)
        return self.v


@dataclass(frozen=True)
class _Judgement:
    """What products with a fixed unit vector say of it."""

    products: int
    value: float
    stderr: float
    residual: float
    noise: float


class _Judge:
    """Sums over products with v, of residuals about a rough ``quotient``.

    Of the products themselves, the noise would be a small difference of large numbers.
    """

    def __init__(self, run: FreshProducts, v: Tensor, quotient: Tensor) -> None:
        self.run, self.v, self.quotient = run, v, quotient.to(real_dtype(v))
        self.space = run.draws.first.space
        self.total = torch.zeros_like(v)
        self.along: list[Tensor] = []
        self.squares: list[Tensor] = []

    def look(self) -> None:
        r = self.run.product(self.v)
        r -= self.v * self.quotient
        self.along.append(self.space.inner(self.v, r)[0, 0].real)
        self.squares.append(self.space.norm(r)[0] ** 2)
        self.total += r


def _judged(run: FreshProducts, v: Tensor, quotient: Tensor, count: int) -> _Judgement:
    """Means over ``count`` further products, over two if there is no more time."""
    judge = _Judge(run, v, quotient)
    for _ in range(_JUDGES):
        judge.look()
    run.steps(count - _JUDGES, judge.look)
    count = len(judge.along)
    values = torch.stack(judge.along)
    small = torch.stack(
        [
            quotient + values.mean(),
            values.var() / count,
            torch.stack(judge.squares).sum(),
            judge.space.norm(judge.total / count)[0] ** 2,
            values.mean() ** 2,
        ]
    )
    run.products.refuse_non_finite(small)
    value, variance, square, total_square, along_square = small.tolist()
    noise = max(0.0, (square - count * total_square) / (count - 1))
    across = total_square - along_square - noise / count
    return _Judgement(count, value, variance**0.5, max(0.0, across) ** 0.5, noise**0.5)


def _refuse(steps: int, momentum: float, tail: float) -> None:
    refuse_fractions(steps=steps)
    refuse_non_numbers(momentum=momentum, tail=tail)
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
