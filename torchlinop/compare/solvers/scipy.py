"""ARPACK, LOBPCG and PROPACK of SciPy, through our adapter."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

from torchlinop.adapters.scipy import as_linear_operator
from torchlinop.compare.answer import Answer
from torchlinop.compare.registry import eigensolver
from torchlinop.compare.request import Request
from torchlinop.operators.base import CurvatureOperator

_ENDLESS = 10**6  # iterations: what ends a run is its tolerance, or its products


def start_array(A: CurvatureOperator, request: Request, columns: int = 1) -> Any:
    """The start of every solver, as NumPy has it."""
    return np.ascontiguousarray(request.start(A, columns).cpu().numpy())


def steps_within(request: Request, first: int, each: int) -> int:
    """Iterations that fit the budget, of so many blocks of k products.

    Raises:
        ValueError: not even one does.
    """
    steps = (request.budget // request.k - first) // each
    if steps < 1:
        raise ValueError(f"a budget of {request.budget} products is less than one iteration")
    return steps


def all_converged(values: Any, vectors: Any) -> Answer:
    """For solvers that raise unless all pairs converged, so that returning is a claim."""
    called = torch.ones(len(values), dtype=torch.bool)
    return Answer(torch.as_tensor(values), torch.as_tensor(vectors), converged=called)


def _arpack(A: CurvatureOperator, request: Request, ncv: int | None) -> Answer:
    found = scipy.sparse.linalg.eigsh(
        as_linear_operator(A),
        request.k,
        which=request.which,
        ncv=ncv,
        tol=request.tol,
        v0=start_array(A, request)[:, 0],
        maxiter=_ENDLESS,
    )
    return all_converged(*found)


@eigensolver("scipy eigsh", budgeted=False)
def arpack(A: CurvatureOperator, request: Request) -> Answer:
    """Implicitly restarted Lanczos (ARPACK), ncv = max(2k + 1, 20)."""
    return _arpack(A, request, None)


@eigensolver("scipy eigsh, ncv=4k", budgeted=False)
def arpack_with_larger_basis(A: CurvatureOperator, request: Request) -> Answer:
    """ARPACK with fewer restarts."""
    return _arpack(A, request, min(max(4 * request.k, 20), A.size - 1))


@eigensolver("scipy lobpcg", which=("LA", "SA"))
def lobpcg(A: CurvatureOperator, request: Request) -> Answer:
    """Its tolerance is absolute. An iteration takes k products, and three blocks come on top."""
    values, vectors, history = scipy.sparse.linalg.lobpcg(
        as_linear_operator(A),
        start_array(A, request, request.k),
        tol=request.absolute_tol,
        maxiter=steps_within(request, 3, 1),
        largest=request.which == "LA",
        retResidualNormsHistory=True,
    )
    residuals = torch.as_tensor(np.array(history[-1]))
    return Answer(torch.as_tensor(values), torch.as_tensor(vectors), residuals)


@eigensolver("scipy svds (propack)", which=("LM",), budgeted=False)
def propack(A: CurvatureOperator, request: Request) -> tuple[Tensor, Tensor]:
    """Golub-Kahan-Lanczos: singular triplets, and λ = σ uᵀv. Its tolerance is relative to ‖A‖."""
    U, sigma, Vh = scipy.sparse.linalg.svds(
        as_linear_operator(A),
        request.k,
        tol=request.tol_of_norm,
        v0=start_array(A, request)[:, 0],
        solver="propack",
    )
    V = torch.as_tensor(np.ascontiguousarray(Vh.T))
    cosines = (torch.as_tensor(np.ascontiguousarray(U)) * V).sum(0)
    return torch.as_tensor(sigma.copy()) * cosines.sign(), V
