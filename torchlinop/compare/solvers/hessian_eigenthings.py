"""Lanczos and deflated power iteration of hessian-eigenthings, on any matrix."""

from __future__ import annotations

from typing import Any

from torchlinop.algorithms.result import optional
from torchlinop.compare.answer import Answer
from torchlinop.compare.registry import eigensolver
from torchlinop.compare.request import Request
from torchlinop.operators.base import CurvatureOperator

_PACKAGE = "hessian_eigenthings"


def _lanczos(
    A: CurvatureOperator, request: Request, steps: int | None, reorthogonalize: bool | None = None
) -> Answer:
    steps = min(steps or 2 * request.k, A.size, request.budget)  # 2k are its default
    result = optional(f"{_PACKAGE}.algorithms.lanczos").lanczos(
        as_lambda(A),
        k=request.k,
        max_iter=steps,
        tol=request.tol,
        reorthogonalize=reorthogonalize,
        which=request.which,
        seed=request.seed,
    )
    return _answer(result)


@eigensolver("hessian-eigenthings lanczos", requires=_PACKAGE, on_host=False)
def lanczos(A: CurvatureOperator, request: Request) -> Answer:
    """With 2k steps, which it takes unless told otherwise."""
    return _lanczos(A, request, None)


@eigensolver("hessian-eigenthings lanczos, 100 steps", requires=_PACKAGE, on_host=False)
def hundred_steps(A: CurvatureOperator, request: Request) -> Answer:
    """Above 50 steps it does not reorthogonalize, unless told to."""
    return _lanczos(A, request, 100)


@eigensolver(
    "hessian-eigenthings lanczos, 100 steps, reorthogonalized", requires=_PACKAGE, on_host=False
)
def hundred_orthogonal_steps(A: CurvatureOperator, request: Request) -> Answer:
    """The same, told to."""
    return _lanczos(A, request, 100, reorthogonalize=True)


@eigensolver("hessian-eigenthings deflated power", which=("LM",), requires=_PACKAGE, on_host=False)
def power_iteration(A: CurvatureOperator, request: Request) -> Answer:
    """One pair after the other, each with its share of the budget."""
    result = optional(f"{_PACKAGE}.algorithms.power_iteration").deflated_power_iteration(
        as_lambda(A),
        k=request.k,
        max_iter=max(1, request.budget // request.k),
        tol=request.tol,
        seed=request.seed,
    )
    return _answer(result)


def as_lambda(A: CurvatureOperator) -> Any:
    """A as an operator of that library."""
    base = optional(f"{_PACKAGE}.operators.base")
    return base.LambdaOperator(A.matvec, A.size, device=A.device, dtype=A.dtype)


def _answer(result: Any) -> Answer:
    return Answer(result.eigenvalues, result.eigenvectors.T, result.residuals, result.converged)
