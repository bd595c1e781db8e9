"""Linear solvers of this library, SciPy and PyLops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch

from torchlinop.adapters.scipy import as_linear_operator
from torchlinop.algorithms.conjugate_gradient import conjugate_gradient
from torchlinop.algorithms.minres import minres
from torchlinop.algorithms.result import optional
from torchlinop.algorithms.solve_result import SolveResult
from torchlinop.compare.registry import linear_solver
from torchlinop.compare.request import SolveRequest
from torchlinop.compare.solves import Solution
from torchlinop.operators.base import CurvatureOperator


def _iterations(request: SolveRequest) -> int:
    """Some products are left for true residuals."""
    return max(1, request.budget - 2 - request.budget // 10)


@linear_solver("torchlinop minres", on_host=False)
def our_minres(A: CurvatureOperator, request: SolveRequest) -> SolveResult:
    """For any symmetric matrix."""
    return minres(A, request.b, rtol=request.rtol, max_iter=_iterations(request))


@linear_solver("torchlinop cg", on_host=False)
def our_cg(A: CurvatureOperator, request: SolveRequest) -> SolveResult:
    """For positive definite ones."""
    return conjugate_gradient(A, request.b, rtol=request.rtol, max_iter=_iterations(request))


def _scipy(name: str, A: CurvatureOperator, request: SolveRequest, **options: Any) -> Solution:
    solve = getattr(scipy.sparse.linalg, name)
    b = request.b.cpu().numpy()
    x, info = solve(as_linear_operator(A), b, rtol=request.rtol, maxiter=request.budget, **options)
    return Solution(torch.as_tensor(x), converged=info == 0)


@linear_solver("scipy cg")
def scipy_cg(A: CurvatureOperator, request: SolveRequest) -> Solution:
    """For positive definite matrices."""
    return _scipy("cg", A, request)


@linear_solver("scipy minres", budgeted=False)
def scipy_minres(A: CurvatureOperator, request: SolveRequest) -> Solution:
    """Its tolerance is relative to ‖A‖ ‖x‖: that it returns says nothing of ``rtol``."""
    return replace(_scipy("minres", A, request), converged=None)


@linear_solver("scipy gmres", budgeted=False)
def scipy_gmres(A: CurvatureOperator, request: SolveRequest) -> Solution:
    """Restarted after 50 steps."""
    return _scipy("gmres", A, request, restart=min(50, A.size))


@linear_solver("pylops cg", requires="pylops")
def pylops_cg(A: CurvatureOperator, request: SolveRequest) -> Solution:
    """Its tolerance is the square of a residual."""
    pylops, steps = optional("pylops"), max(1, request.budget - 1)
    b = request.b.cpu().numpy()
    operator = pylops.LinearOperator(Op=as_linear_operator(A))
    x, iterations, _ = pylops.cg(
        operator,
        b,
        np.zeros_like(b),
        niter=steps,
        tol=(request.rtol * float(np.linalg.norm(b))) ** 2,
    )
    return Solution(torch.as_tensor(x), converged=iterations < steps)
