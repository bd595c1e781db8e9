"""``x += α p,  r −= α A p,  p = M r + β p`` with α, β of every column: conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from torchlinop.algorithms.column_iteration import solve_by
from torchlinop.algorithms.iterates import Iterate, Method
from torchlinop.algorithms.linear_system import SolveOptions, System
from torchlinop.algorithms.solve_result import SolveResult
from torchlinop.choices import refuse_unknown_options
from torchlinop.operators.base import CurvatureOperator


@dataclass(frozen=True)
class _State(Iterate):
    R: Tensor  # (n, k) residuals
    RMR: Tensor  # (k,) rᵀ M r


def conjugate_gradient(
    op: CurvatureOperator, b: Tensor, **options: Unpack[SolveOptions]
) -> SolveResult:
    """Solve ``(A + damping I) x = b`` for a positive definite matrix and one or many b.

    b is a vector (n,) or a block (n, k), whose columns share products and nothing else. A column
    is dropped when its residual is at most ``rtol ‖b‖``, after ``max_iter`` iterations, or when it
    meets a direction of curvature ≤ 0 (within rounding), which the result holds. Consistent
    singular systems are solved too.

    Costs a product an iteration and column, and one more to confirm the residual; memory for four
    blocks besides b. ``options`` and errors: those of `solve`.

    Source: Hestenes and Stiefel 1952; O'Leary 1980 for several right-hand sides.
    """
    refuse_unknown_options(options, SolveOptions.__optional_keys__)
    return solve_by(cg_method, op, b, **options)


def cg_method(problem: System) -> Method[_State]:
    """Conjugate gradients for this problem."""
    A, precondition = problem.A, problem.precondition
    eps = torch.finfo(A.operator.dtype).eps  # of products: curvature below it has no sign

    def start(X: Tensor, R: Tensor, targets: Tensor, scale: Tensor) -> _State:
        Z = precondition(R)
        norms, RMR = A.norms(R), A.dots(R, Z)
        zeros = torch.zeros_like(RMR)
        fails = (norms > 0) & (RMR <= 0)
        never, infinite = torch.zeros_like(fails), torch.full_like(zeros, torch.inf)
        return _State(X, norms, targets, fails, never, X, infinite, scale, fails, zeros, Z, R, RMR)

    def step(s: _State) -> _State:
        P = s.directions
        AP = A(P)
        size = A.norms(P)
        PAP = A.dots(P, AP)
        scale = torch.maximum(s.scale, _ratio(A.norms(AP), size))
        moving = s.residual_norms > s.targets
        curvature = _ratio(PAP, size**2)
        stuck = moving & (curvature <= eps * scale)
        alpha = _ratio(s.RMR, PAP).where(moving & ~stuck, 0.0).to(P.dtype)
        X = s.X.addcmul_(P, alpha)
        R = torch.addcmul(s.R, AP, alpha, value=-1)  # P may share memory with the first R
        Z = precondition(R)
        norms, RMR = A.norms(R), A.dots(R, Z)
        beta = _ratio(RMR, s.RMR).to(P.dtype)
        P = torch.where(stuck, P, torch.addcmul(Z, P, beta))
        fails = s.preconditioner_fails | ((norms > 0) & (RMR <= 0))
        return _State(
            X, norms, s.targets, stuck | fails, s.doubtful, X, s.flatness, scale, fails,
            curvature, P, R, RMR,
        )  # fmt: skip

    return Method("conjugate gradient", start, step, "indefinite", monotone=False)


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    """The quotient, and 0 for 0 / 0."""
    return torch.where(x == 0, 0.0, x / y)
