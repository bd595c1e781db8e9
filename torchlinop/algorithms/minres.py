"""``x_m`` of least ``‖b − A x‖`` in the Krylov space, for any symmetric matrix: MINRES."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchlinop.algorithms.linear_system import Iterate, Method, System, run, system
from torchlinop.algorithms.solve_result import SolveResult
from torchlinop.operators.base import CurvatureOperator

_FLAT = 10  # roundoffs of ‖A‖: a residual that A makes so small is orthogonal to the range of A


@dataclass(frozen=True)
class _State(Iterate):
    """Lanczos vectors u (M u = v), the last two search directions w, and a Givens rotation."""

    R: Tensor  # (n, k) residuals
    U_previous: Tensor  # (n, k), not normalised
    U: Tensor  # (n, k)
    V: Tensor  # (n, k) M U
    W_previous: Tensor  # (n, k)
    beta_previous: Tensor  # (k,)
    beta: Tensor  # (k,) √(uᵀ M u)
    d: Tensor  # (k,) the entry of R that the next rotation completes
    e: Tensor  # (k,) that of the second superdiagonal
    cosine: Tensor  # (k,)
    sine: Tensor  # (k,)
    phi: Tensor  # (k,) the residual in the norm of M
    scale: Tensor  # (k,) a bound below ‖A‖
    flattest: Tensor  # (k,) the least ‖A r‖ / (‖A‖ ‖r‖) so far


def minres(
    op: CurvatureOperator,
    b: Tensor,
    *,
    damping: float = 0.0,
    preconditioner: CurvatureOperator | None = None,
    rtol: float | None = None,
    max_iter: int | None = None,
) -> SolveResult:
    """Solve ``(A + damping I) x = b`` for any symmetric matrix and one or many b.

    As `conjugate_gradient`, but A may be indefinite, and the residual never grows. If b is not in
    the range of a singular A, x tends to a least squares solution, with status ``"singular"``.
    Memory for eight blocks besides b.

    Raises:
        VectorError: b or the preconditioner is not of this space.
        OptionError: no such tolerance; the preconditioner is not positive definite.
        NonFiniteError: b or products hold NaN or infinity.

    Source: Paige and Saunders, SIAM J. Numer. Anal. 12 (1975).
    """
    problem = system(op, b, damping, preconditioner, rtol, max_iter)
    return run(problem, minres_method(problem))


def minres_method(problem: System) -> Method[_State]:
    """MINRES for this problem."""
    A, precondition = problem.A, problem.precondition
    eps = torch.finfo(A.operator.dtype).eps

    def start(X: Tensor, R: Tensor, targets: Tensor) -> _State:
        V = precondition(R)
        norms, square = A.norms(R), A.dots(R, V)
        fails = (norms > 0) & (square <= 0)
        beta = square.clamp_min(0).sqrt()
        zero, one = torch.zeros_like(beta), torch.ones_like(beta)
        Z = torch.zeros_like(R)
        return _State(
            X, norms, targets, fails, torch.zeros_like(fails), fails, zero, Z,
            R, Z, R, V, Z, one, beta, zero, zero, -one, zero, beta, zero, one,
        )  # fmt: skip

    def step(s: _State) -> _State:
        v = s.V * _inverse(s.beta).to(s.V.dtype)
        U = A(v)
        U.addcmul_(s.U_previous, (s.beta * _inverse(s.beta_previous)).to(U.dtype), value=-1)
        alpha = A.dots(v, U)
        U.addcmul_(s.U, (alpha * _inverse(s.beta)).to(U.dtype), value=-1)
        V = precondition(U)
        square = A.dots(U, V)
        beta = square.clamp_min(0).sqrt()
        scale = torch.maximum(s.scale, alpha.abs() + beta)
        # The new column (e, delta, gamma) of R in T = Q R, by the last rotation and the next.
        delta = s.cosine * s.d + s.sine * alpha
        corner = s.sine * s.d - s.cosine * alpha
        d_next, e_next = -s.cosine * beta, s.sine * beta
        gamma = torch.hypot(corner, beta)
        # ‖A r‖ = φ √(corner² + d²): small against ‖A‖ ‖r‖ where r is orthogonal to the range.
        flatness = torch.hypot(corner, d_next) * _inverse(scale)
        stuck = (s.phi > 0) & (torch.minimum(flatness, gamma * _inverse(scale)) <= _FLAT * eps)
        # About a least squares solution, the recurrence can come no nearer than √eps of ‖A‖ ‖r‖,
        # and x explodes thereafter: keep it while it improves by halves.
        noteworthy = (flatness < eps**0.5) & (flatness < s.flattest / 2)
        cosine, sine = corner * _inverse(gamma), beta * _inverse(gamma)
        tau = (cosine * s.phi).where(~stuck, 0.0)
        phi = torch.where(stuck, s.phi, sine * s.phi)
        W = v.addcmul_(s.W_previous, s.e.to(v.dtype), value=-1)
        W.addcmul_(s.directions, delta.to(v.dtype), value=-1).mul_(_inverse(gamma).to(v.dtype))
        X = s.X.addcmul_(W, tau.to(W.dtype))
        R = s.R * torch.where(stuck, 1.0, sine**2).to(U.dtype)
        R.addcmul_(U, (phi * cosine * _inverse(beta)).where(~stuck, 0.0).to(U.dtype), value=-1)
        fails = s.preconditioner_fails | (square < -eps * scale**2)
        return _State(
            X, A.norms(R), s.targets, stuck | fails, noteworthy, fails, alpha, W,
            R, s.U, U, V, s.directions, s.beta, beta, d_next, e_next, cosine, sine, phi, scale,
            torch.minimum(flatness, s.flattest),
        )  # fmt: skip

    return Method("minres", start, step, "singular", monotone=True)


def _inverse(x: Tensor) -> Tensor:
    """``1 / x``, and 0 for 0: what is exhausted stays so."""
    return torch.where(x == 0, 0.0, 1 / x)
