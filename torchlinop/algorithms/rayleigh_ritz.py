"""H Y = G Y Θ with H = S^H A S and G = S^H S: the eigenpairs of A as seen from the span of S."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlinop.algorithms.krylov_schur import Ritz, Which, order_of
from torchlinop.algorithms.orthogonal import real_dtype
from torchlinop.algorithms.products import ROUNDING, Products, roundoff
from torchlinop.algorithms.symmetry_watch import SymmetryWatch
from torchlinop.space import VectorSpace


@dataclass(frozen=True)
class RayleighRitz:
    """Eigenpairs of the projected matrix, in the order wanted; double precision, on the CPU."""

    values: Tensor  # (m,)
    vectors: Tensor  # (m, m) unitary, in the coordinates of an orthonormal basis S F
    F: Tensor  # (j, m) upper triangular, but for rows of zeros where S has columns of zeros

    @property
    def Y(self) -> Tensor:  # noqa: N802
        """The Ritz vectors are the columns of S Y, orthonormal as Y^H G Y = I."""
        return self.F @ self.vectors


class Projector:
    """Projects a matrix on spans, and looks whether it is finite and symmetric there."""

    def __init__(self, products: Products, seed: int, norm: float = 0.0) -> None:
        self.space = products.operator.space
        self.products = products
        self.watch = SymmetryWatch(products, seed)
        self.eps = roundoff(products.operator.dtype)
        self.norm = norm  # the largest |θ| so far, an estimate of ‖A‖ from below
        self.floor = 0.0  # what rounding and noise make of a residual

    def __call__(self, S: Tensor, AS: Tensor, which: Which) -> RayleighRitz:
        """The eigenpairs seen from the columns S (n, j), orthonormal up to rounding, or zero.

        The rounding is accounted for, so that it does not add up from one S to the next. One
        transfer from the device.

        Raises:
            NonFiniteError, SymmetryError: the products are not those of a symmetric matrix.
        """
        H, G = torch.stack([self.space.inner(S, AS), self.space.inner(S, S)]).cpu()
        self.products.refuse_non_finite(G)
        self.floor = max(self.floor, self.watch.defect(H, self.norm))
        alive = G.diagonal().real > 0.5
        L = torch.linalg.cholesky(G[alive][:, alive])
        F = torch.zeros(len(G), len(L), dtype=G.dtype)
        F[alive] = torch.linalg.inv(L.mH)
        values, vectors = torch.linalg.eigh(F.mH @ ((H + H.mH) / 2) @ F)
        self.norm = max(self.norm, float(values.abs().max()))
        self.floor = max(self.floor, ROUNDING * self.eps * self.norm)
        order = order_of(values, which)
        return RayleighRitz(values[order], vectors[:, order], F)

    def pairs(self, S: Tensor, AS: Tensor, which: Which, k: int) -> tuple[Ritz, Tensor]:
        """The k best eigenpairs seen from S, their residuals true, and the vectors (n, k).

        No product: A S is given. Takes 3 k vectors of memory.
        """
        small = self(S, AS, which)
        Y = small.Y[:, :k].to(device=S.device, dtype=S.dtype)
        X = S @ Y
        _, residuals = residual_block(self.space, X, AS @ Y, small.values[:k], self.norm)
        return self.ritz(small, residuals), X

    def ritz(self, small: RayleighRitz, residuals: Tensor) -> Ritz:
        """The leading pairs, as many as there are residuals, to which their rounding is added."""
        b = len(residuals)
        nothing = small.vectors[:0]
        residuals = self.claimed(residuals)
        return Ritz(small.values[:b], small.vectors, residuals, nothing, self.norm, self.floor)

    def claimed(self, residuals: Tensor) -> Tensor:
        """These, as measured, and the rounding in them: independent, so that squares add up."""
        return (residuals**2 + self.floor**2).sqrt()


def residual_block(
    space: VectorSpace, X: Tensor, AX: Tensor, values: Tensor, norm: float
) -> tuple[Tensor, Tensor]:
    """``(A X − X Θ) / ‖A‖`` (n, k) but for a power of two, and ``‖A x − θ x‖`` (k,) on the CPU.

    Squares of entries as small as those of a residual would not be normal numbers in float32.
    """
    unit = 2.0 ** math.frexp(norm)[1] if norm else 1.0
    R = AX / unit
    R -= X * (values / unit).to(device=X.device, dtype=real_dtype(X))
    return R, unit * space.norm(R).cpu()
