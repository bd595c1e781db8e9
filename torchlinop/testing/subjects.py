"""Whatever multiplies vectors, as one of our operators: the subject of an assertion."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from scipy.sparse.linalg import LinearOperator

from torchlinop.adapters.scipy import from_linear_operator
from torchlinop.errors import OptionError
from torchlinop.operators.base import CurvatureOperator
from torchlinop.operators.explicit import LambdaOperator


def as_operator(
    A: Any, *, size: int | None = None, dtype: torch.dtype | DTypeLike = torch.float64
) -> CurvatureOperator:
    """An operator of ours, of SciPy, CuPy or curvlinops, a matrix, or a function, as one of ours.

    A torch operator of another library is anything with a torch ``dtype``, a ``shape`` and ``@``.
    A function takes and gives a vector (n,), and its ``size`` n is needed: a tensor of this
    ``dtype``, or, for a dtype of NumPy, an array.

    Raises:
        OptionError: a function without ``size``, or no operator; VectorError: a matrix that is not
            square.
    """
    if not hasattr(A, "shape") and callable(A):
        if size is None:
            raise OptionError(
                "expected the size n of a function that multiplies vectors (n,), got none; "
                "pass size=n"
            )
        if isinstance(dtype, torch.dtype):
            return LambdaOperator(size, A, dtype=dtype)
        return from_linear_operator(LinearOperator((size, size), matvec=A, dtype=np.dtype(dtype)))
    if not hasattr(A, "shape"):
        raise OptionError(
            f"expected an operator, a matrix or a function, got {type(A).__name__}; pass an array"
        )
    foreign = isinstance(getattr(A, "dtype", None), torch.dtype)
    if foreign and not isinstance(A, torch.Tensor | CurvatureOperator):
        device = getattr(A, "device", "cpu")
        return LambdaOperator(
            A.shape[0],
            lambda v: A @ v,
            matmat=lambda V: A @ V,
            dtype=A.dtype,
            device=device,
        )
    return from_linear_operator(A)
