"""Whatever multiplies vectors, as one of our operators: the subject of an assertion."""

from __future__ import annotations

from typing import Any

import torch

from torchlinop.adapters.scipy import from_linear_operator
from torchlinop.errors import OptionError
from torchlinop.operators.base import CurvatureOperator
from torchlinop.operators.explicit import LambdaOperator


def as_operator(
    A: Any, *, size: int | None = None, dtype: torch.dtype = torch.float64
) -> CurvatureOperator:
    """One of our operators of ours, a SciPy operator, a matrix, a curvlinops operator, a function.

    A torch operator of another library is anything with a torch ``dtype``, a ``shape`` and ``@``.
    A function takes and gives a vector (n,); its ``size`` n is needed, and its dtype.

    Raises:
        OptionError: a function without ``size``; VectorError: a matrix that is not square.
    """
    if not hasattr(A, "shape") and callable(A):
        if size is None:
            raise OptionError(
                "expected the size n of a function that multiplies vectors (n,), got none; "
                "pass size=n"
            )
        return LambdaOperator(size, A, dtype=dtype)
    foreign = isinstance(getattr(A, "dtype", None), torch.dtype)
    if foreign and not isinstance(A, torch.Tensor | CurvatureOperator):
        device = getattr(A, "device", "cpu")
        return LambdaOperator(
            A.shape[0], lambda v: A @ v, matmat=lambda V: A @ V, dtype=A.dtype, device=device
        )
    return from_linear_operator(A)
