"""``x += α p,  r −= α A p,  p = M r + β p`` with α, β of every column: conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchlinop.algorithms.linear_system import Iterate, Method, System, run, system
from torchlinop.algorithms.solve_result import SolveResult
from torchlinop.operators.base import CurvatureOperator


@dataclass(frozen=True)
class _State(Iterate):
    R: Tensor  # (n, k) residuals
    RMR: Tensor  # (k,) rᵀ M r
    scale: Tensor  # (k,) a bound below ‖A‖


def conjugate_gradient(
    op: CurvatureOperator,
    b: Tensor,
    *,
    damping: float = 0.0,
    preconditioner: CurvatureOperator | None = None,
    rtol: float | None = None,
    max_iter: int | None = None,
) -> SolveResult:
    """Solve ``(A + damping I) x = b`` for a positive definite matrix and one or many b.

    b is a vector (n,) or a block (n, k), whose columns share products and nothing else. A column
    is dropped when its residual is at most ``rtol ‖b‖`` (√eps of the operator's dtype), after
    ``max_iter`` (1000) iterations, or when it meets a direction of curvature ≤ 0 (within
    rounding), which the result holds. Consistent singular systems are solved too.

    Costs a product an iteration and column, and one more to confirm the residual; memory for four
    blocks besides b. ``preconditioner`` is an operator about ``A⁻¹``, positive definite.

    Raises:
        VectorError: b or the preconditioner is not of this space.
        OptionError: no such tolerance; the preconditioner is not positive definite.
        NonFiniteError: b or products hold NaN or infinity.

    Source: Hestenes and Stiefel 1952; O'Leary 1980 for several right-hand sides.
    """
    problem = system(op, b, damping, preconditioner, rtol, max_iter)
    return run(problem, cg_method(problem))


def cg_method(problem: System) -> Method[_State]:
    """Conjugate gradients for this problem."""
    A, precondition = problem.A, problem.precondition
    eps = torch.finfo(A.operator.dtype).eps  # of products: curvature below it has no sign

    def start(X: Tensor, R: Tensor, targets: Tensor) -> _State:
        Z = precondition(R)
        norms, RMR = A.norms(R), A.dots(R, Z)
        zeros = torch.zeros_like(RMR)
        fails = (norms > 0) & (RMR <= 0)
        return _State(
            X, norms, targets, fails, torch.zeros_like(fails), fails, zeros, Z, R, RMR, zeros
        )

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
            X, norms, s.targets, stuck | fails, s.noteworthy, fails, curvature, P, R, RMR, scale
        )

    return Method("conjugate gradient", start, step, "indefinite", monotone=False)


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    """The quotient, and 0 for 0 / 0."""
    return torch.where(x == 0, 0.0, x / y)
