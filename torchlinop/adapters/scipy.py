"""A real ``scipy.sparse.linalg.LinearOperator`` over our operators, and the way back."""

from __future__ import annotations

import logging
from typing import Any, cast

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from torchlinop.adapters.adapter import Adapter, AnyOperator
from torchlinop.adapters.cupy import from_cupy, is_of_cupy
from torchlinop.adapters.dlpack import (
    Array,
    array_of,
    host_array,
    numpy_dtype,
    tensor_of,
    torch_dtype,
)
from torchlinop.errors import VectorError
from torchlinop.operators.base import CurvatureOperator
from torchlinop.operators.explicit import LambdaOperator, MatrixOperator

log = logging.getLogger("torchlinop")


def as_linear_operator(
    operator: AnyOperator, *, max_matvecs: int | None = None, progress: bool = False
) -> SciPyOperator:
    """``operator`` for every solver of SciPy (and PyLops, pyamg, PRIMME).

    Vectors are shared with torch, not copied, when operator and solver agree on the dtype and
    the operator is on the CPU; otherwise one copy is made each way. Results are always new,
    writable memory. bfloat16 and float16 operators declare float32.

    Args:
        operator: any operator, symmetric or rectangular; scale and shift it *before* wrapping it
            (``2.0 * operator``). A multiple of the adapter, as ``2.0 * A``, is a new one with a
            count of its own.
        max_matvecs: a budget; the product beyond it raises ProductBudgetError.
        progress: show a bar that counts products, on a terminal.

    Example:
        >>> A = as_linear_operator(LambdaOperator(3, lambda v: 2 * v))
        >>> A @ np.ones(3, dtype=np.float32)
        array([2., 2., 2.], dtype=float32)
    """
    return SciPyOperator(operator, max_matvecs, progress)


class SciPyOperator(Adapter, LinearOperator):
    """The adapter that ``as_linear_operator`` returns. One block product a call."""

    def _matvec(self, x: object) -> Array:
        """``A x`` for (n,) and (n, 1), or of every row of a batch (..., n)."""
        return self._vectors(self.operator, x)

    def _matmat(self, X: object) -> Array:
        """``A X`` for (n, k) in any memory order, or of every block of a batch (..., n, k)."""
        return self._blocks(self.operator, X)

    def _rmatvec(self, x: object) -> Array:
        return self._vectors(self._adjoint_operator, x)

    def _rmatmat(self, X: object) -> Array:
        return self._blocks(self._adjoint_operator, X)

    def _vectors(self, operator: AnyOperator, x: object) -> Array:
        v = host_array(x)
        n = operator.shape[1]
        if v.ndim == 1:
            return self._multiply(operator, v[:, None])[:, 0]
        if v.shape == (n, 1):
            return self._multiply(operator, v)
        if v.shape[-1:] != (n,):
            raise VectorError(
                f"expected vectors of shape ({n},) or (..., {n}), got {v.shape}; "
                "multiply blocks of columns by A @ X"
            )
        rows = self._multiply(operator, v.reshape(-1, n).T).T
        return np.ascontiguousarray(rows).reshape(*v.shape[:-1], operator.shape[0])

    def _blocks(self, operator: AnyOperator, X: object) -> Array:
        V = host_array(cast(Any, X).toarray() if scipy.sparse.issparse(X) else X)
        if V.ndim == 2:
            return self._multiply(operator, V)
        columns = np.moveaxis(V, -2, 0)
        m, n = operator.shape
        AV = self._multiply(operator, columns.reshape(n, -1))
        return np.ascontiguousarray(np.moveaxis(AV.reshape(m, *columns.shape[1:]), 0, -2))

    def _multiply(self, operator: AnyOperator, V: Array) -> Array:
        """The block product in the operator's dtype, returned as NumPy would promote it."""
        dtype = V.dtype if V.dtype == self.dtype else np.result_type(self.dtype, V.dtype)
        if np.iscomplexobj(V) and not operator.dtype.is_complex:
            parts = self._multiply(operator, np.concatenate([V.real, V.imag], axis=1))
            k = V.shape[1]
            both: NDArray[np.complexfloating] = np.empty((len(parts), k), dtype)
            both.real, both.imag = parts[:, :k], parts[:, k:]
            return both
        self._count.add(V.shape[1])
        space = operator.space
        rows = space.own_rows(tensor_of(V, space.dtype, space.device))
        AV = array_of(space.gather(operator.matmat(rows)))
        self._bar.update(V.shape[1])
        return AV if AV.dtype == dtype else AV.astype(dtype)


def from_linear_operator(A: Any) -> CurvatureOperator:
    """A symmetric matrix of another library as one of our operators.

    ``A`` is a dense array or tensor (n, n), a SciPy sparse matrix or array, a SciPy
    LinearOperator, any of these of CuPy (then on its device), or anything with ``shape``,
    ``dtype`` and ``@``. Integer matrices act in float64. Symmetry is taken on trust: ``.check()``
    measures it.

    Raises:
        VectorError: A is not square.
    """
    if isinstance(A, CurvatureOperator):
        return A
    if isinstance(A, SciPyOperator) and isinstance(A.operator, CurvatureOperator):
        return A.operator
    if isinstance(A, Tensor):
        return MatrixOperator(A if A.is_floating_point() or A.is_complex() else A.double())
    if len(A.shape) != 2 or A.shape[0] != A.shape[1]:
        raise VectorError(
            f"expected a square matrix, got shape {tuple(A.shape)}; pass A.T @ A, say"
        )
    if is_of_cupy(A):
        return from_cupy(A)
    dtype = torch_dtype(A.dtype)
    if numpy_dtype(dtype) != A.dtype:
        log.info("a matrix of %s acts in %s", A.dtype, dtype)
    if isinstance(A, np.ndarray):
        return MatrixOperator(tensor_of(A, dtype, torch.device("cpu")))

    def product(V: Tensor) -> Tensor:
        return tensor_of(np.asarray(A @ array_of(V)), dtype, torch.device("cpu"))

    return LambdaOperator(A.shape[0], product, matmat=product, dtype=dtype)
