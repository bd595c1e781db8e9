"""The solvers and estimators of this library, with several sizes of basis and block."""

from __future__ import annotations

from torchlinop.algorithms.eigen_result import EigenResult
from torchlinop.algorithms.lanczos import lanczos
from torchlinop.algorithms.lobpcg import lobpcg
from torchlinop.algorithms.power_iteration import deflated_power_iteration
from torchlinop.algorithms.randomized_eigh import randomized_eigh
from torchlinop.compare.registry import eigensolver
from torchlinop.compare.request import Request
from torchlinop.operators.base import CurvatureOperator


def _lanczos(
    A: CurvatureOperator, request: Request, *, ncv: int | None = None, block_size: int = 1
) -> EigenResult:
    v0 = request.start(A, block_size)
    return lanczos(
        A,
        request.k,
        request.budget,
        which=request.which,
        tol=request.tol,
        seed=request.seed,
        ncv=None if ncv is None else min(ncv, A.size - block_size),
        block_size=block_size,
        v0=v0 if block_size > 1 else v0[:, 0],
        max_seconds=request.seconds,
    )


@eigensolver("torchlinop lanczos", on_host=False)
def default(A: CurvatureOperator, request: Request) -> EigenResult:
    """One vector at a time, ncv = max(2k + 1, 20)."""
    return _lanczos(A, request)


@eigensolver("torchlinop lanczos, ncv=4k", on_host=False)
def larger_basis(A: CurvatureOperator, request: Request) -> EigenResult:
    """Fewer restarts."""
    return _lanczos(A, request, ncv=max(4 * request.k, 20))


@eigensolver("torchlinop lanczos, block_size=4", on_host=False)
def blocks_of_four(A: CurvatureOperator, request: Request) -> EigenResult:
    """Fewer calls of the matrix."""
    return _lanczos(A, request, block_size=min(4, A.size))


@eigensolver("torchlinop lobpcg", which=("LA", "SA"), on_host=False)
def conjugate_gradients(A: CurvatureOperator, request: Request) -> EigenResult:
    """In blocks of k and some guards."""
    return lobpcg(
        A,
        request.k,
        request.budget,
        which="LA" if request.which == "LA" else "SA",
        tol=request.tol,
        seed=request.seed,
        v0=request.start(A, request.k),
        max_seconds=request.seconds,
    )


@eigensolver("torchlinop deflated power", which=("LM",), on_host=False)
def power_iteration(A: CurvatureOperator, request: Request) -> EigenResult:
    """One pair after the other, each with its share of the budget."""
    steps = max(1, request.budget // request.k)
    return deflated_power_iteration(
        A,
        request.k,
        steps,
        tol=request.tol,
        v0=request.start(A)[:, 0],
        seed=request.seed,
        max_seconds=request.seconds,
    )


@eigensolver("torchlinop randomized_eigh", which=("LM",), budgeted=False, on_host=False)
def randomized(A: CurvatureOperator, request: Request) -> EigenResult:
    """Two power iterations on k + 10 columns: no accuracy can be asked for."""
    return randomized_eigh(
        A,
        request.k,
        oversampling=min(10, A.size - request.k),
        power_iterations=2,
        tol=request.tol,
        seed=request.seed,
    )
