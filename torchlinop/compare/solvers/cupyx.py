"""Solvers of CuPy on matrices of a CUDA device, with a relative tolerance by our wrappers."""

from __future__ import annotations

from torchlinop.adapters.cupy_solvers import cupy_eigsh, cupy_lobpcg
from torchlinop.algorithms.eigen_result import EigenResult
from torchlinop.compare.registry import eigensolver
from torchlinop.compare.request import Request
from torchlinop.operators.base import CurvatureOperator


@eigensolver("cupyx eigsh", cuda=True, requires="cupy", on_host=False)
def eigsh(A: CurvatureOperator, request: Request) -> EigenResult:
    """Thick-restart Lanczos; a sweep to scale its tolerance, and k products to judge it, count."""
    return cupy_eigsh(
        A,
        request.k,
        request.budget,
        which=request.which,
        tol=request.tol,
        seed=request.seed,
        v0=request.start(A)[:, 0],
    )


@eigensolver("cupyx lobpcg", which=("LA", "SA"), cuda=True, requires="cupy", on_host=False)
def lobpcg(A: CurvatureOperator, request: Request) -> EigenResult:
    """Its tolerance made relative, and k products to judge it, which count."""
    return cupy_lobpcg(
        A,
        request.k,
        request.budget,
        which="LA" if request.which == "LA" else "SA",
        tol=request.tol,
        seed=request.seed,
        v0=request.start(A, request.k),
    )
