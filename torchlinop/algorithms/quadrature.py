"""``tr f(A) ≈ (n / p) Σ_l Σ_j w_lj f(θ_lj)``: p probes, Gauss nodes θ and weights w of each.

Stochastic Lanczos quadrature without a basis. Expensive and cheap are apart: `slq` multiplies and
returns nodes and weights; density, distribution function and spectral sums are taken from these.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from torchlinop.algorithms.atoms import Atoms, Ritz, location_errors, standard_error
from torchlinop.algorithms.node_values import ScalarFunction, values_at
from torchlinop.algorithms.probes import Probes
from torchlinop.algorithms.products import Products
from torchlinop.algorithms.result import Result
from torchlinop.algorithms.three_term import ThreeTermRecurrence, Tridiagonal
from torchlinop.errors import NonFiniteError, OptionError, VectorError
from torchlinop.operators.base import CurvatureOperator

Bandwidth = float | Literal["range/m"] | None

_STREAM = 4  # of random numbers: other estimators with the same seed draw other probes
_ATOM = 1e-5  # of ‖A‖: how sharply a Ritz value must be known to count as an eigenvalue
_BULK = (0.01, 0.99)  # of the weight that is not in atoms
_ASIDE = 0.1  # of the width of the bulk: how far from it an outlier is
_DECADES = 0.1  # default bandwidth of a density of log₁₀ |λ|


class Estimate(NamedTuple):
    """A mean over probes, and its standard error; infinite for a single probe."""

    value: Tensor
    stderr: Tensor  # of the same shape


class Interval(NamedTuple):
    """A number and bounds on it."""

    value: float
    low: float
    high: float


class Rule(NamedTuple):
    """The quadrature of one probe."""

    nodes: Tensor  # (m,) ascending
    weights: Tensor  # (m,)
    residuals: Tensor  # (m,)


@dataclass(frozen=True)
class SpectralSum(Result):
    """``tr f(A) = Σ f(λ_i)``, estimated."""

    estimate: float
    stderr: float  # of the mean over the independent probes; infinite for a single one
    samples: Tensor  # (probes,)
    matvecs: int
    seed: int

    def confidence_interval(self, level: float = 0.95) -> tuple[float, float]:
        """By Student's t. The bias of too few steps is not in it."""
        half = _quantile(len(self.samples), level) * self.stderr
        return self.estimate - half, self.estimate + half

    def __repr__(self) -> str:
        low, high = self.confidence_interval()
        return (
            f"SpectralSum  {self.estimate:.6g} +- {self.stderr:.2g} (1 s.e.) | "
            f"{len(self.samples)} probes | {self.matvecs} matvecs | seed {self.seed} | "
            f"95 % [{low:.6g}, {high:.6g}]"
        )


@dataclass(frozen=True)
class Quadrature(Result):
    """Gauss quadratures of the spectral measure of a matrix (n, n), one for every probe.

    Tensors are float64, on the CPU; a quadrature that found all there is early ends in NaN.
    """

    nodes: Tensor  # (probes, m) Ritz values, ascending
    weights: Tensor  # (probes, m), adding up to 1 for every probe
    residuals: Tensor  # (probes, m) ‖A x − θ x‖ of the Ritz pairs: an eigenvalue is that near
    size: int  # n
    num_steps: int  # m
    matvecs: int
    seed: int
    dtype: torch.dtype  # of the products
    noise: float  # of the products, relative to ‖A‖
    seconds: float
    warnings: tuple[str, ...] = ()

    @property
    def num_probes(self) -> int:
        return len(self.nodes)

    @property
    def rules(self) -> Iterator[Rule]:
        """The quadrature of every probe, without padding."""
        for row in zip(self.nodes, self.weights, self.residuals, strict=True):
            yield Rule(*(t[torch.isfinite(row[0])] for t in row))

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest Ritz value: but for rounding, inside of the spectrum."""
        nodes = self.nodes[torch.isfinite(self.nodes)]
        return float(nodes.min()), float(nodes.max())

    def cdf(self, x: Tensor | float) -> Estimate:
        """The fraction of eigenvalues that are at most x, for any shape of x."""
        points = torch.as_tensor(x, dtype=torch.float64)
        return _mean(torch.stack([_distribution(rule, points) for rule in self.rules]))

    def cdf_bounds(self, x: Tensor | float) -> tuple[Estimate, Estimate]:
        """Bounds below and above on what the cdf of many probes would be with many steps.

        The distribution function of a measure leaves that of its Gauss quadrature by less than
        the weights of the nodes on both sides of x (Chebyshev, Markov and Stieltjes). Nodes that
        are known as eigenvalues to ``noise`` or 1e-5 ``‖A‖`` count on their side of x.
        """
        points = torch.as_tensor(x, dtype=torch.float64)
        pairs = [_bounds(rule, points, self._tolerance) for rule in self.rules]
        low, high = (torch.stack(side) for side in zip(*pairs, strict=True))
        return _mean(low), _mean(high)

    def density(self, grid: Tensor, sigma: Bandwidth = None) -> Estimate:
        """The density of eigenvalues on an ascending grid (g,), smoothed by a Gaussian.

        Each value is the mean over the cell around its grid point, so that an eigenvalue between
        two points of a coarse grid keeps its mass. ``sigma`` is a bandwidth, ``None`` for
        `bandwidth`, or ``"range/m"``.
        """
        sigma = self.bandwidth(sigma)
        samples = [_smoothed(rule.nodes, rule.weights, grid, sigma) for rule in self.rules]
        return _mean(torch.stack(samples))

    def log_density(self, exponents: Tensor, sigma: float = _DECADES, *, sign: int = 1) -> Estimate:
        """The density of ``log₁₀ |λ|`` on ascending exponents (g,), of one sign of λ.

        Integrates over the exponents to the fraction of eigenvalues of that sign; multiply by
        ``1 / (λ ln 10)`` for a density of λ. ``sigma`` is in decades. Shapes below
        ``|λ| ≈ (range of the bulk) / m`` show the quadrature rather than the matrix.
        """
        if sign not in (1, -1):
            raise OptionError(f"expected sign to be 1 or -1, got {sign}; call it for both")
        refuse_bandwidth(sigma)
        samples = []
        for rule in self.rules:
            of_sign = sign * rule.nodes > 0
            logs = rule.nodes[of_sign].abs().log10()
            samples.append(_smoothed(logs, rule.weights[of_sign], exponents, sigma))
        return _mean(torch.stack(samples))

    def spectral_sum(self, f: ScalarFunction) -> SpectralSum:
        """``tr f(A)``; f acts entry by entry on a float64 tensor, as ``torch.exp`` does.

        Polynomials of degree up to ``2 m − 1`` have no error but that of the probes.

        Raises:
            NonFiniteError: f is not finite at a node, and that node is not rounding of zero.
        """
        samples = self.size * torch.stack(
            [rule.weights @ values_at(f, rule.nodes, self.noise) for rule in self.rules]
        )
        mean, stderr = _mean(samples)
        return SpectralSum(float(mean), float(stderr), samples, self.matvecs, self.seed)

    def bandwidth(self, sigma: Bandwidth = None) -> float:
        """The width of the Gaussian: ``(range of the bulk) / m``, unless a number is given.

        The bulk is the central 98 % of the weight that is not in `atoms`: a few large eigenvalues
        do not widen it, as they do ``"range/m"``, the rule of other libraries.
        """
        refuse_bandwidth(sigma)
        if isinstance(sigma, (int, float)):
            return float(sigma)
        low, high = self.range
        left, right = self.bulk
        spans = [high - low, max(-low, high), 1.0]
        if sigma is None:
            spans.insert(0, right - left)
        # A single point has no width: the first span that is one.
        span: float = next(span for span in spans if span > self._tolerance)
        return span / self.num_steps

    @property
    def bulk(self) -> tuple[float, float]:
        """The central 98 % of the weight outside of atoms; the heaviest atom if there is none."""
        atoms, rest = self._atoms_and_rest
        if not rest.any():
            heaviest = float(atoms.values[atoms.masses.argmax()])
            return heaviest, heaviest
        order = self._ritz.nodes[rest].argsort()
        nodes, weights = self._ritz.nodes[rest][order], self._ritz.weights[rest][order]
        cumulated = weights.cumsum(0) / weights.sum()
        low, high = torch.searchsorted(cumulated, torch.tensor(_BULK, dtype=torch.float64))
        return float(nodes[low]), float(nodes[min(int(high), len(nodes) - 1)])

    @property
    def atoms(self) -> Atoms:
        """Eigenvalues known to ``noise`` or 1e-5 ``‖A‖``, on which half of the probes agree."""
        return self._atoms_and_rest[0]

    @property
    def outliers(self) -> Atoms:
        """The atoms aside of the bulk, by a tenth of its width. Copies are joined: count them."""
        low, high = self.bulk
        aside = max(_ASIDE * (high - low), self._tolerance)
        values = self.atoms.values
        return self.atoms.select((values < low - aside) | (values > high + aside))

    def negative_mass(self, level: float = 0.95) -> Interval:
        """The fraction of eigenvalues below zero, beyond rounding, with an interval.

        The interval joins `cdf_bounds` and Student's t for the probes.
        """
        below = np.nextafter(-self.noise * max(map(abs, self.range)), -math.inf)
        low, high = self.cdf_bounds(below)
        t = _quantile(self.num_probes, level)
        return Interval(
            float(self.cdf(below).value),
            max(0.0, float(low.value - t * low.stderr)),
            min(1.0, float(high.value + t * high.stderr)),
        )

    def wasserstein_bound(self, eta: float = 0.05) -> float:
        """A bound on the Wasserstein-1 distance to the true distribution of eigenvalues.

        Holds with probability ``1 − eta``: ``range · max(12 / (m − 1/2), √(4 ln(2n/η) / ((n + 2)
        p)))``, a priori and usually ten times too large. The range is that of the nodes, widened
        by the residuals of the outermost. Source: Chen, Trogdon and Ubaru, ICML 2021.
        """
        _refuse_probability("eta", eta, 0.05)
        low = min(float(rule.nodes[0] - rule.residuals[0]) for rule in self.rules)
        high = max(float(rule.nodes[-1] + rule.residuals[-1]) for rule in self.rules)
        sampling = 4 * math.log(2 * self.size / eta) / ((self.size + 2) * self.num_probes)
        return (high - low) * min(1.0, max(12 / (self.num_steps - 0.5), math.sqrt(sampling)))

    @property
    def _tolerance(self) -> float:
        return max(_ATOM, self.noise) * max(map(abs, self.range))

    @functools.cached_property
    def _ritz(self) -> Ritz:
        there = torch.isfinite(self.nodes)
        probe = torch.arange(self.num_probes)[:, None].expand_as(self.nodes)
        errors = [location_errors(r.nodes, r.residuals, self._tolerance) for r in self.rules]
        nodes, weights = self.nodes[there], self.weights[there]
        return Ritz(probe[there], nodes, weights, torch.cat(errors), self.num_probes)

    @functools.cached_property
    def _atoms_and_rest(self) -> tuple[Atoms, Tensor]:
        return self._ritz.atoms(self._tolerance, self.size)

    def __repr__(self) -> str:
        low, high = self.range
        return (
            f"Quadrature  n = {self.size:,} | {self.num_probes} probes x {self.num_steps} steps | "
            f"{self.matvecs} matvecs | {self.seconds:.2g} s | "
            f"{str(self.dtype).removeprefix('torch.')} | seed {self.seed} | "
            f"nodes in [{low:.6g}, {high:.6g}]"
        )


def slq(
    op: CurvatureOperator,
    num_probes: int = 10,
    num_steps: int = 80,
    *,
    seed: int = 0,
    probes_at_once: int | None = None,
) -> Quadrature:
    """Nodes and weights of stochastic Lanczos quadrature.

    Probes are uniform on the sphere, each drawn from a stream of its own that depends on the seed
    and its number. They advance together through ``num_steps`` blocks of products (never more
    than n), ``probes_at_once`` of them if memory is short. Costs ``num_probes num_steps``
    products and memory for three blocks (n, probes at once). Ctrl-C ends the recurrence and
    returns the steps taken, or the probes that are complete.

    Raises:
        OptionError: fewer than one probe or step; NonFiniteError: products are not finite.

    Source: Golub and Meurant 2010, chapter 4; Ubaru, Chen and Saad, SIMAX 38 (2017).
    """
    start = time.perf_counter()
    at_once = num_probes if probes_at_once is None else probes_at_once
    if min(num_probes, num_steps, at_once) < 1:
        raise OptionError(
            f"expected at least one probe and step, got {num_probes} probes, {at_once} at once, "
            f"and {num_steps} steps; leave them out for 10 and 80"
        )
    A = Products(op)
    probes = Probes(op.space, "sphere", seed, _STREAM)
    steps = min(num_steps, op.size)
    tridiagonals: list[Tridiagonal] = []
    for first in range(0, num_probes, at_once):
        V = probes.columns(first, min(first + at_once, num_probes))
        new = _quadratures(A, V / A.norms(V).to(V.dtype), steps)
        complete = len(new) > 0 and new[0].taken == steps
        if complete or not tridiagonals:
            tridiagonals += new
        if not complete:
            break
    if not tridiagonals:
        raise KeyboardInterrupt
    shortest = tridiagonals[0].taken
    done = f"{shortest} of {steps} steps of {len(tridiagonals)} of {num_probes} probes"
    warnings = () if complete else (f"interrupted after {done}",)
    return Quadrature(
        _padded([T.nodes for T in tridiagonals], steps),
        _padded([T.weights for T in tridiagonals], steps),
        _padded([T.residuals for T in tridiagonals], steps),
        op.size,
        shortest,
        A.matvecs,
        seed,
        op.dtype,
        A.noise,
        time.perf_counter() - start,
        warnings,
    )


def logdet(
    op: CurvatureOperator,
    *,
    damping: float = 0.0,
    num_probes: int = 10,
    num_steps: int = 80,
    seed: int = 0,
) -> SpectralSum:
    """``log det(A + damping I)`` of a positive definite matrix, by `slq`.

    Raises:
        NonFiniteError: the matrix is not positive definite, beyond rounding.
    """
    quadrature = slq(op.shift(damping) if damping else op, num_probes, num_steps, seed=seed)
    low, high = quadrature.range
    if low <= quadrature.noise * max(-low, high):
        raise NonFiniteError(
            f"log det needs a positive definite matrix, but a Ritz value is {low:.3g} "
            f"(the largest: {high:.3g}); pass damping={max(-2 * low, 1e-3 * high):.1g}, say"
        )
    return quadrature.spectral_sum(torch.log)


def quadrature_size(distance: float, size: int, eta: float = 0.05) -> tuple[int, int]:
    """How many steps and probes bound the Wasserstein distance by ``distance`` times the range.

    With probability ``1 − eta``, for a matrix of ``size`` rows. Source: Chen, Trogdon and Ubaru,
    ICML 2021: ``m ≥ 12 / t + 1/2`` and ``p ≥ 4 ln(2n/η) / ((n + 2) t²)``.
    """
    _refuse_probability("eta", eta, 0.05)
    if not 0 < distance < 1:
        raise OptionError(f"expected a distance between 0 and 1, got {distance}; pass 0.1, say")
    probes = 4 * math.log(2 * size / eta) / ((size + 2) * distance**2)
    return math.ceil(12 / distance + 0.5), math.ceil(probes)


def _quadratures(A: Products, V: Tensor, steps: int) -> list[Tridiagonal]:
    recurrence = ThreeTermRecurrence(A, V)
    try:
        for _ in range(steps):
            recurrence.advance()
    except KeyboardInterrupt:
        pass  # the steps before it are good
    return recurrence.tridiagonals() if recurrence.steps else []


def _padded(rows: list[Tensor], length: int) -> Tensor:
    padded = torch.full((len(rows), length), torch.nan, dtype=torch.float64)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded


def _mean(samples: Tensor) -> Estimate:
    return Estimate(samples.mean(0), standard_error(samples))


def _cumulated(rule: Rule) -> Tensor:
    """The weight of the first 0, 1, ... m nodes, (m + 1,)."""
    return torch.cat([rule.weights.new_zeros(1), rule.weights.cumsum(0)]).clamp_max(1.0)


def _distribution(rule: Rule, x: Tensor) -> Tensor:
    return _cumulated(rule)[torch.searchsorted(rule.nodes, x, right=True)]


def _bounds(rule: Rule, x: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """The weight certainly at most x, and that possibly so."""
    cumulated, m = _cumulated(rule), len(rule.nodes)
    count = torch.searchsorted(rule.nodes, x, right=True)
    known = location_errors(rule.nodes, rule.residuals, tolerance) <= tolerance
    below = torch.where((count > 0) & ~known[(count - 1).clamp_min(0)], count - 1, count)
    above = torch.where((count < m) & ~known[count.clamp_max(m - 1)], count + 1, count)
    return cumulated[below], cumulated[above]


def _smoothed(points: Tensor, weights: Tensor, grid: Tensor, sigma: float) -> Tensor:
    """Means of ``Σ w_j N(points_j, sigma²)`` over the cells around the grid points, (g,)."""
    edges = _edges(grid)
    below = torch.special.ndtr((edges[:, None] - points) / sigma) @ weights
    density: Tensor = below.diff().clamp_min_(0) / edges.diff()  # rounding may leave -1e-17
    return density


def _edges(grid: Tensor) -> Tensor:
    """Midpoints between grid points, and half a step beyond the ends, (g + 1,)."""
    x = torch.as_tensor(grid, dtype=torch.float64, device="cpu")
    if x.ndim != 1 or len(x) < 2 or not (x.diff() > 0).all():
        raise VectorError(
            f"expected an ascending grid of two points or more, got shape {tuple(x.shape)}; "
            "pass torch.linspace(low, high, 1000)"
        )
    middles = (x[1:] + x[:-1]) / 2
    return torch.cat([2 * x[:1] - middles[:1], middles, 2 * x[-1:] - middles[-1:]])


def refuse_bandwidth(sigma: object) -> None:
    """Raise OptionError for what is no `Bandwidth`."""
    number = isinstance(sigma, (int, float)) and 0 < sigma < math.inf
    if not (number or sigma is None or sigma == "range/m"):
        raise OptionError(
            f'expected sigma to be a positive number, None or "range/m", got {sigma!r}; '
            "leave it out"
        )


def _refuse_probability(name: str, p: float, example: float) -> None:
    if not 0 < p < 1:
        raise OptionError(f"expected {name} between 0 and 1, got {p}; pass {example}")


def _quantile(samples: int, level: float) -> float:
    """Of Student's t, for a two-sided interval; infinite for a single sample."""
    _refuse_probability("level", level, 0.95)
    return float(stdtrit(samples - 1, (1 + level) / 2)) if samples > 1 else math.inf
