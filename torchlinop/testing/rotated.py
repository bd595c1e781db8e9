"""A = Q diag(λ) Qᵀ, Q = S H never formed: any spectrum, known eigenvectors, n up to millions."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinop.errors import VectorError
from torchlinop.operators.base import CurvatureOperator
from torchlinop.space import VectorSpace


def hartley(V: Tensor) -> Tensor:
    """``H V`` for columns V (n, k): ``H_ij = (cos + sin)(2π i j / n) / √n``, symmetric, H H = I.

    One fast Fourier transform. Source: Hartley 1942; Bracewell, The Hartley Transform, 1986.
    """
    F = torch.fft.fft(V, dim=0)
    transformed: Tensor = (F.real - F.imag) / len(V) ** 0.5
    return transformed


class RotatedOperator(CurvatureOperator):
    """A symmetric matrix with these eigenvalues (n,), in their dtype, float32 or float64.

    H mixes all entries and S is a diagonal of random signs, so that no eigenvector is sparse or
    smooth. A product costs two Fourier transforms and rounds by about ``ε log n ‖A‖``.

    Raises:
        VectorError: the eigenvalues are no vector of float32 or float64.
    """

    def __init__(self, eigenvalues: Tensor, *, seed: int = 0) -> None:
        if eigenvalues.ndim != 1 or eigenvalues.dtype not in (torch.float32, torch.float64):
            raise VectorError(
                "expected eigenvalues (n,) in float32 or float64, got "
                f"{tuple(eigenvalues.shape)} in {eigenvalues.dtype}; pass torch.linspace(1, 2, n)"
            )
        space = VectorSpace(len(eigenvalues), eigenvalues.dtype, eigenvalues.device)
        super().__init__(space, description=["prescribed spectrum"])
        self.eigenvalues = eigenvalues
        self._signs = space.random(1, seed, "rademacher")

    def eigenvectors(self, indices: Tensor) -> Tensor:
        """The eigenvectors (n, k) of ``eigenvalues[indices]``, unit columns."""
        E = torch.zeros(self.size, len(indices), dtype=self.dtype, device=self.device)
        E[indices, torch.arange(len(indices))] = 1
        return self._signs * hartley(E)

    def _matmat(self, V: Tensor) -> Tensor:
        return self._signs * hartley(self.eigenvalues[:, None] * hartley(self._signs * V))
