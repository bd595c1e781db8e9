"""``x_m`` of least ``‖b − A x‖`` in the Krylov space, for any symmetric matrix: MINRES."""

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

_STUCK = 10  # roundoffs of ‖A‖: a pivot so small is zero
_FLAT = 10  # √roundoffs of ‖A‖ ‖r‖: ‖A r‖ comes no nearer to 0 by this recurrence, and x explodes
_RISING = 100  # times its least: ‖A r‖ was smallest, and rounding has taken over


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


def minres(op: CurvatureOperator, b: Tensor, **options: Unpack[SolveOptions]) -> SolveResult:
    """Solve ``(A + damping I) x = b`` for any symmetric matrix and one or many b.

    As `conjugate_gradient`, but A may be indefinite, and the residual never grows. If b is not in
    the range of a singular A, x is about a solution of least squares and the status
    ``"singular"``; the shortest one, where rounding allows and there is no preconditioner.
    Eigenvalues below 10 √eps ``‖A‖`` may count as zero then. Memory for ten blocks besides b.
    ``options`` and errors: those of `solve`.

    Source: Paige and Saunders, SIAM J. Numer. Anal. 12 (1975).
    """
    refuse_unknown_options(options, SolveOptions.__optional_keys__)
    return solve_by(minres_method, op, b, **options)


def minres_method(problem: System) -> Method[_State]:
    """MINRES for this problem."""
    A, precondition = problem.A, problem.precondition
    eps = torch.finfo(A.operator.dtype).eps
    flat = min(_FLAT * eps**0.5, 0.01)

    def start(X: Tensor, R: Tensor, targets: Tensor, scale: Tensor) -> _State:
        V = precondition(R)
        norms, square = A.norms(R), A.dots(R, V)
        fails = (norms > 0) & (square <= 0)
        beta = square.clamp_min(0).sqrt()
        zero, one = torch.zeros_like(beta), torch.ones_like(beta)
        Z = torch.zeros_like(R)
        infinite = torch.full_like(zero, torch.inf)
        return _State(
            X, norms, targets, fails, torch.zeros_like(fails), X.clone(), infinite, scale, fails,
            zero, Z, R, Z, R, V, Z, one, beta, zero, zero, -one, zero, beta,
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
        # ‖A r‖ = φ √(corner² + d²), of the residual r of the x before this step.
        flatness = torch.hypot(corner, d_next) * _inverse(scale)
        torch.where(flatness < s.flatness, s.X, s.fallback, out=s.fallback)
        flattest = torch.minimum(flatness, s.flatness)
        doubtful = (flattest <= flat) & (flatness > _RISING * flattest)
        stuck = (s.phi > 0) & (torch.minimum(flatness, gamma * _inverse(scale)) <= _STUCK * eps)
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
            X, A.norms(R), s.targets, stuck | fails, doubtful, s.fallback, flattest, scale, fails,
            alpha, W, R, s.U, U, V, s.directions, s.beta, beta, d_next, e_next, cosine, sine, phi,
        )  # fmt: skip

    return Method("minres", start, step, "stagnated", monotone=True, flat=flat)


def _inverse(x: Tensor) -> Tensor:
    """``1 / x``, and 0 for 0: what is exhausted stays so."""
    return torch.where(x == 0, 0.0, 1 / x)
