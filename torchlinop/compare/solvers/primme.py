"""PRIMME: Davidson methods with thick restarts, through our adapter for SciPy."""

from __future__ import annotations

from torchlinop.adapters.scipy import as_linear_operator
from torchlinop.algorithms.result import optional
from torchlinop.compare.answer import Answer
from torchlinop.compare.registry import eigensolver
from torchlinop.compare.request import Request
from torchlinop.compare.solvers.scipy import all_converged, start_array
from torchlinop.operators.base import CurvatureOperator


def _primme(A: CurvatureOperator, request: Request, method: str) -> Answer:
    """Its tolerance is relative to ‖A‖; it raises unless all pairs converged."""
    values, vectors = optional("primme").eigsh(
        as_linear_operator(A),
        request.k,
        which=request.which,
        v0=start_array(A, request),
        tol=request.tol_of_norm,
        method=method,
    )
    return all_converged(values, vectors)


@eigensolver("primme eigsh", budgeted=False, requires="primme")
def default(A: CurvatureOperator, request: Request) -> Answer:
    """The method it takes unless told otherwise."""
    return _primme(A, request, "PRIMME_DEFAULT_METHOD")


@eigensolver("primme eigsh, fewest products", budgeted=False, requires="primme")
def fewest_products(A: CurvatureOperator, request: Request) -> Answer:
    """Generalized Davidson with k previous vectors."""
    return _primme(A, request, "PRIMME_DEFAULT_MIN_MATVECS")
