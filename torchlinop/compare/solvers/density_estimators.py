"""Spectral densities of this library, hessian-eigenthings, curvlinops and PyHessian."""

from __future__ import annotations

import numpy as np
import torch

from torchlinop.algorithms.result import optional
from torchlinop.algorithms.spectral_density import SpectralDensity, spectral_density
from torchlinop.compare.densities import DensityAnswer
from torchlinop.compare.registry import density_estimator
from torchlinop.compare.request import DensityRequest
from torchlinop.compare.solvers.hessian_eigenthings import as_lambda
from torchlinop.compare.solvers.pyhessian import as_pyhessian, in_dtype_of
from torchlinop.operators.base import CurvatureOperator

_POINTS = 2000  # of the grid


@density_estimator("torchlinop spectral_density")
def ours(A: CurvatureOperator, request: DensityRequest) -> SpectralDensity:
    """Stochastic Lanczos quadrature."""
    return spectral_density(A, request.probes, request.steps, _POINTS, seed=request.seed)


@density_estimator("hessian-eigenthings spectral_density", requires="hessian_eigenthings")
def hessian_eigenthings(A: CurvatureOperator, request: DensityRequest) -> DensityAnswer:
    """Its probe i has the seed ``seed + i``: seeds are spaced, so that none is shared."""
    result = optional("hessian_eigenthings.algorithms").spectral_density(
        as_lambda(A),
        num_runs=request.probes,
        lanczos_steps=request.steps,
        num_grid_points=_POINTS,
        seed=1000 * request.seed,
    )
    there = torch.isfinite(result.raw_eigenvalues)
    nodes, weights = result.raw_eigenvalues[there], result.raw_weights[there]
    return DensityAnswer(nodes, weights, result.grid, result.density)


@density_estimator("curvlinops fast_lanczos", requires="curvlinops")
def curvlinops(A: CurvatureOperator, request: DensityRequest) -> DensityAnswer:
    """The quadrature of every probe, as it averages them."""
    spectrum = optional("curvlinops.papyan2020traces.spectrum")
    with in_dtype_of(A):
        runs = [spectrum.fast_lanczos(A, request.steps) for _ in range(request.probes)]
    return DensityAnswer(
        torch.cat([nodes for nodes, _ in runs]),
        torch.cat([vectors[0] ** 2 for _, vectors in runs]),
    )


@density_estimator("pyhessian density", requires="pyhessian")
def pyhessian(A: CurvatureOperator, request: DensityRequest) -> DensityAnswer:
    """Its quadrature."""
    with in_dtype_of(A):
        nodes, weights = as_pyhessian(A).density(iter=request.steps, n_v=request.probes)
    return DensityAnswer(*(torch.tensor(np.array(x)).flatten() for x in (nodes, weights)))
