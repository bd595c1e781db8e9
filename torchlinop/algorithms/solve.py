"""``x = (A + damping I)⁻¹ b``: one call for a solution, and the inverse as an operator."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from torchlinop.algorithms.conjugate_gradient import conjugate_gradient
from torchlinop.algorithms.minres import minres
from torchlinop.algorithms.solve_result import SolveResult
from torchlinop.errors import OptionError
from torchlinop.operators.base import CurvatureOperator

SolveMethod = Literal["auto", "minres", "cg"]

# For a positive definite matrix too, the residuals of MINRES are at most those of conjugate
# gradients (Fong and Saunders 2012), and an indefinite one is no surprise to it.
_METHODS = {"auto": minres, "minres": minres, "cg": conjugate_gradient}


def solve(
    op: CurvatureOperator,
    b: Tensor,
    damping: float = 0.0,
    preconditioner: CurvatureOperator | None = None,
    method: SolveMethod = "auto",
    *,
    rtol: float | None = None,
    max_iter: int | None = None,
) -> SolveResult:
    """Solve ``(A + damping I) x = b`` for a vector (n,) or the columns of a block (n, k).

    ``"auto"`` is `minres`: it takes any symmetric matrix. ``"cg"`` is `conjugate_gradient`, for
    positive definite ones: half the memory, and it returns a direction of negative curvature if it
    meets one. ``preconditioner`` is an operator about the inverse, as of K-FAC. Residuals in the
    result are true ones; a warning says which columns did not reach ``rtol ‖b‖``.

    Raises:
        OptionError: unknown method, no such tolerance, or an indefinite preconditioner.
        VectorError: b or the preconditioner is not of this space.
        NonFiniteError: b or products hold NaN or infinity.
    """
    algorithm = _METHODS[_checked(method)]
    return algorithm(
        op, b, damping=damping, preconditioner=preconditioner, rtol=rtol, max_iter=max_iter
    )


def inverse(
    op: CurvatureOperator,
    damping: float = 0.0,
    preconditioner: CurvatureOperator | None = None,
    method: SolveMethod = "auto",
    *,
    rtol: float | None = None,
    max_iter: int | None = None,
) -> InverseOperator:
    """``(A + damping I)⁻¹`` as an operator, whose every product is a `solve`.

    It is symmetric and linear up to ``rtol`` times the condition number.
    """
    return InverseOperator(
        op,
        damping=damping,
        preconditioner=preconditioner,
        method=_checked(method),
        rtol=rtol,
        max_iter=max_iter,
    )


class InverseOperator(CurvatureOperator):
    """``(A + damping I)⁻¹``. Warns where a solve does not converge."""

    def __init__(
        self,
        operator: CurvatureOperator,
        *,
        damping: float,
        preconditioner: CurvatureOperator | None,
        method: SolveMethod,
        rtol: float | None,
        max_iter: int | None,
    ) -> None:
        description = f"inverse of {type(operator).__name__} + {damping:g} I by {method}"
        super().__init__(operator.space, layout=operator.layout, description=[description])
        self.operator = operator
        self.damping = damping
        self.preconditioner = preconditioner
        self.method: SolveMethod = method
        self.rtol = rtol
        self.max_iter = max_iter

    def _matmat(self, V: Tensor) -> Tensor:
        result = solve(
            self.operator,
            V,
            self.damping,
            self.preconditioner,
            self.method,
            rtol=self.rtol,
            max_iter=self.max_iter,
        )
        return result.x.to(self.dtype)


def _checked(method: SolveMethod) -> SolveMethod:
    if method not in _METHODS:
        raise OptionError(f"unknown method {method!r}; choose one of {', '.join(_METHODS)}")
    return method
