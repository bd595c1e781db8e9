"""``tr f(A) ≈ (n / p) Σ_l Σ_j w_lj f(θ_lj)``: p probes, their Gauss nodes θ and weights w.

All that can be asked of a stochastic Lanczos quadrature after its products are spent.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchlinop.algorithms.atoms import Atoms, Ritz, location_errors
from torchlinop.algorithms.distribution_bounds import sharp_bounds
from torchlinop.algorithms.estimates import (
    Estimate,
    Interval,
    mean_of,
    of_probes,
    quantile,
    refuse_probability,
)
from torchlinop.algorithms.node_values import ScalarFunction, moved, values_at
from torchlinop.algorithms.products import roundoff
from torchlinop.algorithms.result import Result
from torchlinop.algorithms.smoothing import Bandwidth, refuse_bandwidth, smoothed_measure
from torchlinop.errors import OptionError

_ATOM = 1e-5  # of ‖A‖: how sharply a Ritz value must be known to count as an eigenvalue
_BULK = (0.01, 0.99)  # of the weight that is not in atoms
_ASIDE = 0.1  # of the width of the bulk: how far from it an outlier is
_MOVED = 4  # roundings in an eigenvalue, of those that all probes have in common
_DECADES = 0.1  # default bandwidth of a density of log₁₀ |λ|


class Rule(NamedTuple):
    """The quadrature of one probe."""

    nodes: Tensor  # (m,) ascending
    weights: Tensor  # (m,)
    residuals: Tensor  # (m,)


@dataclass(frozen=True, eq=False)
class SpectralSum(Result):
    """``tr f(A) = Σ f(λ_i)``, estimated."""

    estimate: float
    # Of the mean over the probes, by the law of spheres, and at least what rounding does to
    # eigenvalues; infinite for a single probe.
    stderr: float
    samples: Tensor  # (probes,)
    matvecs: int
    seed: int
    warnings: tuple[str, ...] = ()  # of the quadrature

    def confidence_interval(self, level: float = 0.95) -> tuple[float, float]:
        """By Student's t. The bias of too few steps is not in it."""
        half = quantile(len(self.samples), level) * self.stderr
        return self.estimate - half, self.estimate + half

    def __repr__(self) -> str:
        low, high = self.confidence_interval()
        return (
            f"SpectralSum  {self.estimate:.6g} +- {self.stderr:.2g} (1 s.e.) | "
            f"{len(self.samples)} probes | {self.matvecs} matvecs | seed {self.seed} | "
            f"95 % [{low:.6g}, {high:.6g}]" + _listed(self.warnings)
        )


@dataclass(frozen=True, eq=False)
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
        return self._fraction([_distribution(rule, points) for rule in self.rules])

    def cdf_bounds(self, x: Tensor | float) -> tuple[Estimate, Estimate]:
        """Bounds below and above on what the cdf would be with the same probes and many steps.

        The sharp ones of Chebyshev, Markov and Stieltjes: no method could do better with these
        products. Cost an eigendecomposition (m + 1) for every point and probe.
        """
        points = torch.as_tensor(x, dtype=torch.float64)
        pairs = [sharp_bounds(*rule, points) for rule in self.rules]
        low, high = zip(*pairs, strict=True)
        return self._fraction(low), self._fraction(high)

    def density(self, grid: Tensor, sigma: Bandwidth = None) -> Estimate:
        """The density of eigenvalues on an ascending grid (g,), smoothed by a Gaussian.

        Each value is the mean over the cell around its grid point, so that an eigenvalue between
        two points of a coarse grid keeps its mass. ``sigma`` is a bandwidth, ``None`` for
        `bandwidth`, or ``"range/m"``.
        """
        sigma = self.bandwidth(sigma)
        samples = [smoothed_measure(rule.nodes, rule.weights, grid, sigma) for rule in self.rules]
        return mean_of(torch.stack(samples))

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
            samples.append(smoothed_measure(logs, rule.weights[of_sign], exponents, sigma))
        return mean_of(torch.stack(samples))

    def spectral_sum(self, f: ScalarFunction) -> SpectralSum:
        """``tr f(A)``; f acts entry by entry on a float64 tensor, as ``torch.exp`` does.

        Polynomials of degree up to ``2 m − 1`` have no error but that of the probes.

        Raises:
            NonFiniteError: f is not finite at a node, and that node is not rounding of zero.
        """
        rules = list(self.rules)
        values = [values_at(f, rule.nodes, self.noise) for rule in rules]
        means = torch.stack([r.weights @ y for r, y in zip(rules, values, strict=True)])
        squares = [r.weights @ (y - means.mean()) ** 2 for r, y in zip(rules, values, strict=True)]
        mean, stderr = self._of_probes(means.mean(), torch.stack(squares).mean())
        # Rounding moves the eigenvalues for all probes alike.
        distance = _MOVED * roundoff(self.dtype) * max(map(abs, self.range))
        pairs = zip(rules, values, strict=True)
        moves = [r.weights @ moved(f, r.nodes, y, distance) for r, y in pairs]
        stderr = torch.maximum(stderr, torch.stack(moves).mean())
        n = self.size
        return SpectralSum(
            n * float(mean), n * float(stderr), n * means, self.matvecs, self.seed, self.warnings
        )

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
        """The central 98 % of the weight outside of atoms.

        The heaviest atom, if that is less than half an eigenvalue: copies of atoms under way.
        """
        atoms, rest = self._atoms_and_rest
        outside = float(self._ritz.weights[rest].sum()) / self.num_probes
        if self.size * outside < 0.5:
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
        t = quantile(self.num_probes, level)
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
        refuse_probability("eta", eta, 0.05)
        low = min(float(rule.nodes[0] - rule.residuals[0]) for rule in self.rules)
        high = max(float(rule.nodes[-1] + rule.residuals[-1]) for rule in self.rules)
        sampling = 4 * math.log(2 * self.size / eta) / ((self.size + 2) * self.num_probes)
        return (high - low) * min(1.0, max(12 / (self.num_steps - 0.5), math.sqrt(sampling)))

    def _fraction(self, samples: Sequence[Tensor]) -> Estimate:
        """The mean of fractions of eigenvalues: of a function that is 0 or 1."""
        p = torch.stack(list(samples)).mean(0)
        return self._of_probes(p, p * (1 - p))

    def _of_probes(self, mean: Tensor, variance: Tensor) -> Estimate:
        complex_ = self.dtype.is_complex
        return of_probes(mean, variance, self.num_probes, self.size, complex_)

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
            f"nodes in [{low:.6g}, {high:.6g}]" + _listed(self.warnings)
        )


def _cumulated(rule: Rule) -> Tensor:
    """The weight of the first 0, 1, ... m nodes, (m + 1,)."""
    return torch.cat([rule.weights.new_zeros(1), rule.weights.cumsum(0)]).clamp_max(1.0)


def _distribution(rule: Rule, x: Tensor) -> Tensor:
    return _cumulated(rule)[torch.searchsorted(rule.nodes, x, right=True)]


def _listed(warnings: tuple[str, ...]) -> str:
    return f"\n  warnings: {'; '.join(warnings)}" if warnings else ""
