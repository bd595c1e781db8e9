"""What an algorithm is given: an operator, not a matrix or a model; tensors, not arrays."""

from __future__ import annotations

from torch import Tensor

from torchlinop.errors import OptionError, VectorError
from torchlinop.operators.base import CurvatureOperator


def refuse_no_operator(op: object, name: str = "op") -> None:
    """Raise OptionError for anything but a symmetric operator: a tensor, an array, a model."""
    if not isinstance(op, CurvatureOperator):
        raise OptionError(
            f"expected {name} to be a CurvatureOperator, got {type(op).__name__}; pass "
            "MatrixOperator(A) for a tensor, from_linear_operator(A) for SciPy's and others"
        )


def refuse_no_tensor(name: str, vector: object) -> None:
    """Raise VectorError for anything but a tensor: a list, an array, a number."""
    if not isinstance(vector, Tensor):
        raise VectorError(
            f"expected {name} to be a tensor, got {type(vector).__name__}; "
            f"pass torch.as_tensor({name})"
        )
