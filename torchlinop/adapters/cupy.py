"""A real ``cupyx.scipy.sparse.linalg.LinearOperator`` over our operators, and the way back."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchlinop.adapters.adapter import Adapter, AnyOperator
from torchlinop.adapters.cupy_memory import copy_of_cupy, cupy, cupy_of, tensor_of_cupy
from torchlinop.adapters.dlpack import torch_dtype
from torchlinop.articles import kind_of
from torchlinop.errors import OptionError, VectorError
from torchlinop.operators.base import CurvatureOperator
from torchlinop.operators.explicit import MatrixOperator
from torchlinop.space import VectorSpace


def as_cupy_operator(
    operator: AnyOperator, *, max_matvecs: int | None = None, progress: bool = False
) -> CuPyProducts:
    """``operator`` for the solvers of cupyx, on its GPU, with no byte copied.

    torch reads the memory of CuPy's vectors, and CuPy gets the memory of the products, which is
    new at every one. Each library works on its own current stream, and waits for the other's.
    bfloat16 and float16 operators declare float32, at one conversion each way.

    Args:
        operator: any operator on a CUDA device, symmetric or rectangular.
        max_matvecs: a budget; the product beyond it raises ProductBudgetError.
        progress: show a bar that counts products, on a terminal.

    Raises:
        VectorError: the operator is not on a CUDA device.
        OptionError: CuPy is not installed, or sees no GPU.
    """
    library = cupy()
    if operator.device.type != "cuda":
        raise VectorError(
            f"expected an operator on a CUDA device, got {operator!r}; move the model there, or "
            "take as_linear_operator and SciPy"
        )
    if not library.cuda.is_available():
        raise OptionError(
            f"expected CuPy {library.__version__} to find the GPU of {operator.device}, as torch "
            f"{torch.__version__} does, but it finds no driver it can use; install the CuPy of "
            f"your driver's CUDA version"
        )
    return cupy_operator(operator, max_matvecs, progress)


def cupy_operator(
    operator: AnyOperator, max_matvecs: int | None = None, progress: bool = False
) -> CuPyProducts:
    """The adapter, wherever the operator is."""
    base = cupy("cupyx.scipy.sparse.linalg").LinearOperator
    return _class_on(base)(operator, max_matvecs, progress)


class CuPyProducts(Adapter):
    """The adapter that ``as_cupy_operator`` returns, but for its base class, which is CuPy's."""

    def _matvec(self, x: Any) -> Any:
        return self._multiply(self.operator, x)

    def _matmat(self, X: Any) -> Any:
        return self._multiply(self.operator, X)

    def _rmatvec(self, x: Any) -> Any:
        return self._multiply(self._adjoint_operator, x)

    def _rmatmat(self, X: Any) -> Any:
        return self._multiply(self._adjoint_operator, X)

    def _multiply(self, operator: AnyOperator, X: Any) -> Any:
        """The products (m,) or (m, k) of the columns of X, (n,) or (n, k), in one call."""
        with torch.cuda.device(operator.device):
            V = tensor_of_cupy(X, operator.device)
            columns = V[:, None] if V.ndim == 1 else V
            self._count.add(columns.shape[1])
            AV = _product(operator, columns)
            self._bar.update(columns.shape[1])
            promoted = np.result_type(self.dtype, X.dtype)  # type: ignore[attr-defined]
            AV = AV.to(torch_dtype(promoted))
            return cupy_of(AV[:, 0] if V.ndim == 1 else AV)

    def __reduce__(self) -> tuple[Any, ...]:
        return cupy_operator, (self.operator, *self._options)


@cache
def _class_on(base: type) -> type[CuPyProducts]:
    return type("CuPyOperator", (CuPyProducts, base), {"__module__": __name__})


def _product(operator: AnyOperator, V: Tensor) -> Tensor:
    """A V in the operator's precision; a real A acts on both parts of a complex V."""
    if V.is_complex() and not operator.dtype.is_complex:
        parts = _product(operator, torch.cat([V.real, V.imag], dim=1))
        wide = torch.promote_types(parts.dtype, torch.float32)
        real, imaginary = parts.to(wide).chunk(2, dim=1)
        return torch.complex(real, imaginary)
    return operator.matmat(V.to(operator.dtype))


def is_of_cupy(A: object) -> bool:
    """Whether A is an array, sparse matrix or operator of CuPy, without importing it."""
    return any(t.__module__.partition(".")[0] in ("cupy", "cupyx") for t in type(A).__mro__)


def from_cupy(A: Any) -> CurvatureOperator:
    """A symmetric array, sparse matrix or LinearOperator of CuPy as one of our operators."""
    if isinstance(A, CuPyProducts) and isinstance(A.operator, CurvatureOperator):
        return A.operator
    library = cupy()
    held = getattr(A, "device", None) or library.cuda.Device()  # operators do not say where
    device = torch.device("cuda", held.id)
    if isinstance(A, library.ndarray):
        with torch.cuda.device(device):
            matrix = tensor_of_cupy(A, device)
        return MatrixOperator(matrix.to(torch_dtype(A.dtype)))
    return CuPyMatrix(A, device)


class CuPyMatrix(CurvatureOperator):
    """A symmetric sparse matrix or LinearOperator of CuPy, which multiplies tensors in place.

    The product is copied out of CuPy's memory: its allocator knows nothing of torch's streams.
    """

    def __init__(self, matrix: Any, device: torch.device) -> None:
        space = VectorSpace(matrix.shape[0], torch_dtype(matrix.dtype), device)
        super().__init__(space, description=[f"{kind_of(matrix)} of CuPy"])
        self.matrix = matrix

    def _matmat(self, V: Tensor) -> Tensor:
        with torch.cuda.device(self.device):
            return copy_of_cupy(self.matrix @ cupy_of(V), self.device).to(self.dtype)
