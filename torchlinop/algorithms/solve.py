"""``x = (A + damping I)⁻¹ b``: one call for a solution, and the inverse as an operator."""

from __future__ import annotations

import math
from typing import Literal, Unpack

from torch import Tensor

from torchlinop.algorithms.column_iteration import checked_limits
from torchlinop.algorithms.conjugate_gradient import conjugate_gradient
from torchlinop.algorithms.linear_system import SolveOptions, StopOptions
from torchlinop.algorithms.minres import minres
from torchlinop.algorithms.sizes import refuse_run
from torchlinop.algorithms.solve_result import SolveResult
from torchlinop.choices import refuse_unknown, refuse_unknown_options
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
    max_seconds: float = math.inf,
    progress: bool = False,
    strict: bool = False,
) -> SolveResult:
    """Solve ``(A + damping I) x = b`` for a vector (n,) or the columns of a block (n, k).

    ``"auto"`` is `minres`: it takes any symmetric matrix. ``"cg"`` is `conjugate_gradient`, for
    positive definite ones: half the memory, and it returns a direction of negative curvature if it
    meets one. Residuals in the result are true ones; a warning says which columns did not reach
    ``rtol ‖b‖``, and why. Ctrl-C returns what there is, after one product to judge it.

    - ``preconditioner``: an operator about ``(A + damping I)⁻¹``, positive definite.
    - ``rtol``: residuals are to be at most ``rtol ‖b‖``; None for √eps of the operator's dtype.
    - ``max_iter``: iterations; None for 1000.
    - ``max_seconds``: return what there is after this time, with status ``"maxseconds"``.
    - ``progress``: show a bar that counts products, on a terminal.
    - ``strict``: raise NotConvergedError, which carries the result, in place of a warning.

    Raises:
        OptionError: unknown method, no such tolerance, or an indefinite preconditioner.
        VectorError: b or the preconditioner is not of this space.
        NonFiniteError: b or products hold NaN or infinity; MemoryEstimateError: memory ran out.
        SymmetryError: A is not symmetric, or its products do not repeat.
        NotConvergedError: by strict=True, where others warn.
    """
    algorithm = _METHODS[_checked(method)]
    return algorithm(
        op,
        b,
        damping=damping,
        preconditioner=preconditioner,
        rtol=rtol,
        max_iter=max_iter,
        max_seconds=max_seconds,
        progress=progress,
        strict=strict,
    )


def inverse(
    op: CurvatureOperator,
    damping: float = 0.0,
    preconditioner: CurvatureOperator | None = None,
    method: SolveMethod = "auto",
    **options: Unpack[StopOptions],
) -> InverseOperator:
    """``(A + damping I)⁻¹`` as an operator, whose every product is a `solve`.

    It is symmetric and linear up to ``rtol`` times the condition number. Where a solve does not
    converge, it warns with the residual, or with ``strict=True`` raises NotConvergedError.
    ``options`` are those of `solve`: rtol, max_iter, max_seconds, progress and strict.

    Raises:
        OptionError, VectorError: as `solve`, of what can be told before a product.
    """
    refuse_unknown_options(options, StopOptions.__optional_keys__)
    refuse_run(damping, options.get("max_seconds", math.inf))
    checked_limits(op, options.get("rtol"), options.get("max_iter"), preconditioner)
    whole: SolveOptions = {"damping": damping, "preconditioner": preconditioner, **options}
    return InverseOperator(op, _checked(method), whole)


class InverseOperator(CurvatureOperator):
    """``(A + damping I)⁻¹``. Warns where a solve does not converge, or raises."""

    def __init__(
        self, operator: CurvatureOperator, method: SolveMethod, options: SolveOptions
    ) -> None:
        damping = options.get("damping", 0.0)
        description = f"inverse of {type(operator).__name__} + {damping:g} I by {method}"
        super().__init__(
            operator.space,
            layout=operator.layout,
            description=[description],
            positive_semidefinite=operator.positive_semidefinite and damping >= 0,
        )
        self.operator = operator
        self.method: SolveMethod = method
        self.options = options

    def _matmat(self, V: Tensor) -> Tensor:
        return _METHODS[self.method](self.operator, V, **self.options).x.to(self.dtype)


def _checked(method: SolveMethod) -> SolveMethod:
    refuse_unknown("method", method, _METHODS)
    return method
