"""The density of eigenvalues on a grid: a quadrature of the spectral measure, smoothed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from torchlinop.algorithms.atoms import Atoms
from torchlinop.algorithms.estimates import Estimate, Interval
from torchlinop.algorithms.quadrature import LongRun, slq
from torchlinop.algorithms.quadrature_result import Quadrature
from torchlinop.algorithms.result import Result
from torchlinop.algorithms.sizes import refuse_fractions
from torchlinop.algorithms.smoothing import Bandwidth, refuse_bandwidth
from torchlinop.choices import refuse_unknown_options
from torchlinop.errors import OptionError
from torchlinop.operators.base import CurvatureOperator

_MARGIN = 6.0  # bandwidths beyond the outermost nodes: leaves out 1e-9 of a Gaussian
_SHOWN = 5  # outliers in a repr


@dataclass(frozen=True, repr=False, eq=False)
class SpectralDensity(Result):
    """A density that integrates to one over its grid, and the quadrature behind it.

    Another grid, bandwidth or scale is asked of ``quadrature``, and costs no product.
    """

    grid: Tensor  # (g,) ascending, equally spaced
    density: Tensor  # (g,) mean over the probes
    stderr: Tensor  # (g,) of the mean; infinite for a single probe
    sigma: float  # bandwidth of the Gaussian
    quadrature: Quadrature

    _columns: ClassVar[tuple[str, ...]] = ("grid", "density", "stderr")
    _parts: ClassVar[Mapping[str, type[Result]]] = {"quadrature": Quadrature}

    @property
    def raw_eigenvalues(self) -> Tensor:
        """Ritz values of every probe, (probes, m), padded by NaN."""
        return self.quadrature.nodes

    @property
    def raw_weights(self) -> Tensor:
        """Their weights, (probes, m), adding up to 1 for every probe."""
        return self.quadrature.weights

    @property
    def outliers(self) -> Atoms:
        """See `Quadrature.outliers`."""
        return self.quadrature.outliers

    @property
    def matvecs(self) -> int:
        return self.quadrature.matvecs

    @property
    def seed(self) -> int:
        return self.quadrature.seed

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.quadrature.warnings

    def cdf(self, x: Tensor | float) -> Estimate:
        """See `Quadrature.cdf`: the quadrature's own, without smoothing."""
        return self.quadrature.cdf(x)

    def negative_mass(self, level: float = 0.95) -> Interval:
        """See `Quadrature.negative_mass`."""
        return self.quadrature.negative_mass(level)

    def scalars(self) -> dict[str, float]:
        """What a logger records."""
        low, high = self.quadrature.range
        negative = self.negative_mass()
        return {
            "smallest_node": low,
            "largest_node": high,
            "sigma": self.sigma,
            "negative_mass": negative.value,
            "outliers": float(self.outliers.counts.sum()),
        }

    def plot(self, ax: Any = None) -> Any:
        """Log density with a band of two standard errors, in a matplotlib Axes, which is returned.

        Ritz values are marked below.

        Raises:
            OptionError: matplotlib is not installed.
        """
        try:
            import matplotlib.pyplot as plt  # noqa: PLC0415  # an optional package
        except ImportError as error:
            raise OptionError("plot needs matplotlib; run: pip install matplotlib") from error
        if ax is None:
            _, ax = plt.subplots()
        floor = 1e-3 / (self.quadrature.size * self.sigma)  # a thousandth of one eigenvalue
        low, high = self.density - 2 * self.stderr, self.density + 2 * self.stderr
        ax.fill_between(self.grid, low.clamp_min(floor), high.clamp_min(floor), alpha=0.3)
        ax.semilogy(self.grid, self.density.clamp_min(floor))
        ax.axvline(0.0, color="0.6", linewidth=0.8)
        nodes = self.quadrature.nodes[torch.isfinite(self.quadrature.nodes)]
        ax.plot(nodes, torch.full_like(nodes, floor), "|", color="0.4")
        ax.set(xlabel="eigenvalue", ylabel="density")
        return ax

    def __repr__(self) -> str:
        q = self.quadrature
        (low, high), (left, right) = q.range, q.bulk
        negative = self.negative_mass()
        outliers = self.outliers
        listed = [f"{value:.4g}" for value in outliers.values.flip(0)[:_SHOWN].tolist()]
        listed += ["..."] if len(outliers) > _SHOWN else []
        lines = [
            f"SpectralDensity  n = {q.size:,} | {q.num_probes} probes x {q.num_steps} steps | "
            f"{q.matvecs} matvecs | {q.seconds:.2g} s | {str(q.dtype).removeprefix('torch.')} | "
            f"seed {q.seed}",
            f"  nodes      from {low:.4g} to {high:.4g}",
            f"  bulk       from {left:.4g} to {right:.4g}, sigma {self.sigma:.2g}",
            f"  negative   {negative.value:.2%} of the eigenvalues, "
            f"95 % [{negative.low:.2%}, {negative.high:.2%}]",
            f"  outliers   {len(outliers)}: {', '.join(listed) or 'none'}",
            f"  warnings: {'; '.join(self.warnings) or 'none'}",
        ]
        return "\n".join(lines)


def spectral_density(  # noqa: PLR0917  # in the order that callers know
    op: CurvatureOperator,
    num_runs: int = 10,
    lanczos_steps: int = 80,
    num_grid_points: int = 10_000,
    sigma: Bandwidth = None,
    seed: int = 0,
    **options: Unpack[LongRun],
) -> SpectralDensity:
    """The density of eigenvalues, by stochastic Lanczos quadrature.

    ``sigma=None`` takes the range of the bulk over ``lanczos_steps``, so that a few large
    eigenvalues do not smear the rest; ``sigma="range/m"`` the range of all. Costs ``num_runs
    lanczos_steps`` products and memory for three blocks of ``probes_at_once`` (all) columns.
    ``options`` are those of `slq`: probes_at_once, max_seconds, progress and checkpoint.

    Raises:
        OptionError: fewer than one probe or step, or two grid points; no such bandwidth.
    """
    refuse_unknown_options(options, LongRun.__optional_keys__ | {"num_runs", "lanczos_steps"})
    refuse_fractions(num_grid_points=num_grid_points)
    if num_grid_points < 2:
        raise OptionError(f"expected two grid points or more, got {num_grid_points}; leave it out")
    refuse_bandwidth(sigma)
    quadrature = slq(op, num_runs, lanczos_steps, seed=seed, **options)
    return smoothed(quadrature, num_grid_points, sigma)


def smoothed(
    quadrature: Quadrature, num_grid_points: int = 10_000, sigma: Bandwidth = None
) -> SpectralDensity:
    """The density on a grid over all nodes, of a quadrature at hand or loaded from a file."""
    width = quadrature.bandwidth(sigma)
    low, high = quadrature.range
    margin = _MARGIN * width
    grid = torch.linspace(low - margin, high + margin, num_grid_points, dtype=torch.float64)
    density, stderr = quadrature.density(grid, width)
    return SpectralDensity(grid, density, stderr, width, quadrature)
