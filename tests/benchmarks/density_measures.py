"""Spectral densities at equal products: Wasserstein distances to the true spectrum, and time."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from eigen_measures import silence
from eigen_peers import as_lambda, as_pyhessian, in_double_precision
from scipy.stats import wasserstein_distance
from solver_problems import Counted, Matrix
from torch import Tensor

from torchlinop.algorithms.spectral_density import spectral_density

POINTS = 10_000  # of the grid


@dataclass(frozen=True)
class Found:
    """A quadrature, and its density on a grid."""

    nodes: Tensor
    weights: Tensor  # adding up to the number of probes
    grid: Tensor
    density: Tensor


Density = Callable[[Counted, int, int, int], Found]  # of A, probes, steps, seed


@dataclass(frozen=True)
class DensityRow:
    """The medians of all seeds."""

    quadrature: float = math.nan  # distance of nodes and weights to the spectrum, of its range
    density: float = math.nan  # distance of the smoothed density, likewise
    seconds: float = math.nan
    columns: float = math.nan
    calls: float = math.nan
    failure: str = ""


def ours(A: Counted, probes: int, steps: int, seed: int) -> Found:
    result = spectral_density(A.ours(), probes, steps, POINTS, seed=seed)
    there = torch.isfinite(result.raw_eigenvalues)
    nodes, weights = result.raw_eigenvalues[there], result.raw_weights[there]
    return Found(nodes, weights, result.grid, result.density)


def theirs(A: Counted, probes: int, steps: int, seed: int) -> Found:
    from hessian_eigenthings.algorithms.spectral_density import spectral_density as of_he

    # Its probe i has the seed `seed + i`: seeds are spaced, for these are not to be shared.
    result = of_he(
        as_lambda(A),
        num_runs=probes,
        lanczos_steps=steps,
        num_grid_points=POINTS,
        seed=1000 * seed,
    )
    there = torch.isfinite(result.raw_eigenvalues)
    nodes, weights = result.raw_eigenvalues[there], result.raw_weights[there]
    return Found(nodes, weights, result.grid, result.density)


def by_curvlinops(A: Counted, probes: int, steps: int, seed: int) -> Found:
    """Its own average over probes, with the true ends of the spectrum given."""
    from curvlinops.papyan2020traces.spectrum import (
        fast_lanczos,
        lanczos_approximate_spectrum_from_iter,
    )

    ends = (float(A.matrix.eigenvalues.min()), float(A.matrix.eigenvalues.max()))
    with in_double_precision(seed):
        runs = [fast_lanczos(A, steps) for _ in range(probes)]
    pairs = [
        lanczos_approximate_spectrum_from_iter(run, ends, POINTS, kappa=3.0, margin=0.05)
        for run in runs
    ]
    return Found(
        torch.cat([nodes for nodes, _ in runs]),
        torch.cat([vectors[0] ** 2 for _, vectors in runs]),
        pairs[0][0],
        torch.stack([density for _, density in pairs]).mean(0),
    )


def by_pyhessian(A: Counted, probes: int, steps: int, seed: int) -> Found:
    with in_double_precision(seed):
        nodes, weights = as_pyhessian(A).density(iter=steps, n_v=probes)
    flat = [torch.tensor(np.array(x)).flatten() for x in (nodes, weights)]
    return Found(*flat, torch.zeros(2), torch.full((2,), math.nan))


DENSITIES: dict[str, Density] = {
    "torchlinop spectral_density": ours,
    "hessian-eigenthings spectral_density": theirs,
    "curvlinops Lanczos (default width)": by_curvlinops,
    "PyHessian density": by_pyhessian,
}


def measure(matrix: Matrix, density: Density, probes: int, steps: int, seeds: int) -> DensityRow:
    rows = []
    exact = matrix.eigenvalues.numpy()
    span = float(exact.max() - exact.min())
    for seed in range(seeds):
        A = Counted(matrix)
        try:
            with silence():
                started = time.perf_counter()
                found = density(A, probes, steps, seed)
                seconds = time.perf_counter() - started
        except ImportError as error:
            return DensityRow(failure=f"not installed ({error.name})")
        except Exception as error:  # others' failures are rows
            return DensityRow(failure=f"{type(error).__name__}: {str(error).splitlines()[0][:60]}")
        rows.append(
            (
                distance(found.nodes, found.weights, exact) / span,
                distance(found.grid, found.density, exact) / span,
                seconds,
                A.columns,
                A.calls,
            )
        )
    return DensityRow(*(statistics.median(column) for column in zip(*rows, strict=True)))


def distance(points: Tensor, weights: Tensor, exact: np.ndarray) -> float:
    """The Wasserstein-1 distance: the integral of the difference of distribution functions."""
    if bool(torch.isnan(weights).any()):
        return math.nan
    return float(wasserstein_distance(points.numpy(), exact, weights.clamp_min(0).numpy()))
