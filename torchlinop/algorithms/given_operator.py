"""What an algorithm is given: an operator, not a matrix or a model."""

from __future__ import annotations

from torchlinop.errors import OptionError
from torchlinop.operators.base import CurvatureOperator


def refuse_no_operator(op: object) -> None:
    """Raise OptionError for anything but a symmetric operator: a tensor, an array, a model."""
    if not isinstance(op, CurvatureOperator):
        raise OptionError(
            f"expected op to be a CurvatureOperator, got {type(op).__name__}; pass "
            "MatrixOperator(A) for a tensor, from_linear_operator(A) for SciPy's and others"
        )
