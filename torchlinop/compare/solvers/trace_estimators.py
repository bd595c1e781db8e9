"""Trace estimators of this library, hessian-eigenthings, curvlinops and PyHessian."""

from __future__ import annotations

from typing import Any

from torchlinop.algorithms.result import optional
from torchlinop.algorithms.trace import trace
from torchlinop.algorithms.trace_method import Method
from torchlinop.algorithms.trace_result import TraceResult
from torchlinop.compare.registry import trace_estimator
from torchlinop.compare.request import TraceRequest
from torchlinop.compare.solvers.hessian_eigenthings import as_lambda
from torchlinop.compare.solvers.pyhessian import as_pyhessian, in_dtype_of
from torchlinop.operators.base import CurvatureOperator


def _ours(A: CurvatureOperator, request: TraceRequest, method: Method) -> TraceResult:
    return trace(A, request.num_matvecs, method=method, seed=request.seed)


@trace_estimator("torchlinop hutchinson")
def hutchinson(A: CurvatureOperator, request: TraceRequest) -> TraceResult:
    """The mean of ωᵀAω."""
    return _ours(A, request, "hutchinson")


@trace_estimator("torchlinop hutch++")
def hutch_plus_plus(A: CurvatureOperator, request: TraceRequest) -> TraceResult:
    """Exact on a sketched subspace."""
    return _ours(A, request, "hutch++")


@trace_estimator("torchlinop xtrace")
def xtrace(A: CurvatureOperator, request: TraceRequest) -> TraceResult:
    """Every probe for all purposes."""
    return _ours(A, request, "xtrace")


def _theirs(A: CurvatureOperator, request: TraceRequest, method: str) -> tuple[float, float]:
    found = optional("hessian_eigenthings.algorithms").trace(
        as_lambda(A), num_matvecs=request.num_matvecs, method=method, seed=request.seed
    )
    return found.estimate, found.stderr


@trace_estimator("hessian-eigenthings hutchinson", requires="hessian_eigenthings")
def their_hutchinson(A: CurvatureOperator, request: TraceRequest) -> tuple[float, float]:
    """With its standard error."""
    return _theirs(A, request, "hutchinson")


@trace_estimator("hessian-eigenthings hutch++", requires="hessian_eigenthings")
def their_hutch_plus_plus(A: CurvatureOperator, request: TraceRequest) -> tuple[float, float]:
    """With its standard error."""
    return _theirs(A, request, "hutch++")


def _curvlinops(A: CurvatureOperator, request: TraceRequest, name: str) -> float:
    with in_dtype_of(A):
        return float(getattr(optional("curvlinops"), name)(_Multiplied(A), request.num_matvecs))


@trace_estimator("curvlinops hutchinson", requires="curvlinops")
def curvlinops_hutchinson(A: CurvatureOperator, request: TraceRequest) -> float:
    """Without a standard error."""
    return _curvlinops(A, request, "hutchinson_trace")


@trace_estimator("curvlinops hutch++", requires="curvlinops")
def curvlinops_hutch_plus_plus(A: CurvatureOperator, request: TraceRequest) -> float:
    """It takes multiples of three products."""
    return float(_curvlinops(A, _in_thirds(request), "hutchpp_trace"))


@trace_estimator("curvlinops xtrace", requires="curvlinops")
def curvlinops_xtrace(A: CurvatureOperator, request: TraceRequest) -> float:
    """It takes even numbers of products."""
    even = TraceRequest(request.num_matvecs // 2 * 2, request.seed)
    return _curvlinops(A, even, "xtrace")


@trace_estimator("pyhessian trace", requires="pyhessian")
def pyhessian_trace(A: CurvatureOperator, request: TraceRequest) -> float:
    """With ``tol=0``, so that it spends all products."""
    with in_dtype_of(A):
        samples = as_pyhessian(A).trace(maxIter=request.num_matvecs, tol=0.0)
    return float(sum(samples) / len(samples))


@trace_estimator("pyhessian trace, default tol", requires="pyhessian")
def pyhessian_default(A: CurvatureOperator, request: TraceRequest) -> float:
    """It stops where its running mean changes by less than 1e-3."""
    with in_dtype_of(A):
        samples = as_pyhessian(A).trace(maxIter=request.num_matvecs)
    return float(sum(samples) / len(samples))


def _in_thirds(request: TraceRequest) -> TraceRequest:
    return TraceRequest(request.num_matvecs // 3 * 3, request.seed)


class _Multiplied:
    """What curvlinops asks of an operator: a shape, a dtype, a device, and ``@``."""

    def __init__(self, A: CurvatureOperator) -> None:
        self.shape, self.dtype, self.device = A.shape, A.dtype, A.device
        self._A = A

    def __matmul__(self, V: Any) -> Any:
        return self._A @ V.contiguous()
