"""Matrices the user already has: as entries (MatrixOperator), or as a product (LambdaOperator)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchlinop.errors import VectorError
from torchlinop.operators.base import CurvatureOperator
from torchlinop.space import VectorSpace


class MatrixOperator(CurvatureOperator):
    """A symmetric (or Hermitian) matrix given by its entries, a tensor (n, n), used in place."""

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise VectorError(
                f"expected a square matrix, got shape {tuple(matrix.shape)}; pass A.T @ A, say"
            )
        if not (matrix.is_floating_point() or matrix.is_complex()):
            raise VectorError(f"expected floating-point entries, got {matrix.dtype}; use .double()")
        super().__init__(VectorSpace(len(matrix), matrix.dtype, matrix.device))
        self.matrix = matrix.detach()

    def _matmat(self, V: Tensor) -> Tensor:
        return self.matrix @ V


class LambdaOperator(CurvatureOperator):
    """A symmetric matrix given by its product ``matvec: (n,) -> (n,)``.

    ``matmat: (n, k) -> (n, k)`` takes blocks in one call; without it, columns are taken one by
    one. They must not write into what they are given, which a solver may share (VectorError where
    torch can tell), and are called with gradients enabled, for they may be backward passes of their
    own. Results are copied, as nothing is known about the memory they are in.

    Example:
        >>> LambdaOperator(3, lambda v: 2.0 * v) @ torch.ones(3)
        tensor([2., 2., 2.])
    """

    def __init__(
        self,
        size: int,
        matvec: Callable[[Tensor], Tensor],
        *,
        matmat: Callable[[Tensor], Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        where = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        super().__init__(VectorSpace(size, dtype, where))
        self._of_vector = matvec
        self._of_block = matmat or self._column_by_column

    def _matmat(self, V: Tensor) -> Tensor:
        before = _version(V)
        with torch.enable_grad():
            AV = self._of_vector(V[:, 0])[:, None] if V.shape[1] == 1 else self._of_block(V)
        if _version(V) != before:
            raise VectorError(
                "the product wrote into its argument, which a solver goes on to use; return a new "
                "tensor: 2 * v, say, in place of v.mul_(2)"
            )
        if AV.shape != V.shape or AV.dtype != V.dtype or AV.device != V.device:
            raise VectorError(
                f"expected the product to return {V.dtype} of shape {tuple(V.shape)} on "
                f"{V.device}, got {AV.dtype} of shape {tuple(AV.shape)} on {AV.device}; "
                "return the product in the form of its argument"
            )
        return AV.detach().clone(memory_format=torch.contiguous_format)

    def _column_by_column(self, V: Tensor) -> Tensor:
        return torch.stack([self._of_vector(v) for v in V.unbind(1)], dim=1)


def _version(V: Tensor) -> int:
    """Grows with every write into the memory of V; tensors of inference mode do not count them."""
    return 0 if V.is_inference() else V._version
