"""Orthonormal [X, P, W], where P is how X came from the X before and W = M (A X − X Θ)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import normalize

from torchlinop.algorithms.basis import Basis
from torchlinop.algorithms.krylov_schur import Ritz, Which
from torchlinop.algorithms.orthogonal import IN_SPAN, orthonormalize, real_dtype
from torchlinop.algorithms.products import Products
from torchlinop.algorithms.rayleigh_ritz import Projector, RayleighRitz, residual_block
from torchlinop.errors import NonFiniteError
from torchlinop.operators.base import CurvatureOperator

_PARALLEL = 1e-8  # directions in coefficients that differ by less are one
_TINY = torch.finfo(torch.float64).tiny


class Blocks:
    """Orthonormal columns [X, P, W] (or zero), and their products with A.

    X has ``b`` columns, up to ``most`` once the span has as many.
    """

    def __init__(
        self, products: Products, M: CurvatureOperator | None, X: Tensor, most: int, seed: int
    ) -> None:
        self.products, self.M = products, M
        self.space = products.operator.space
        self.b = self.size = X.shape[1]
        self.most = most
        self.S, self.AS = (
            Basis(self.space, X, 3 * most, dtype=None, device=None) for _ in range(2)
        )
        self.S.put(0, X)
        self.AS.put(0, products.columns(X))
        self.projector = Projector(products, seed)
        self.threshold = 50 * torch.finfo(X.dtype).eps  # of a unit vector: rounding error
        self.R = X[:, :0]  # (A X − X Θ) but for a factor

    def _leading(self, columns: int) -> tuple[Tensor, Tensor]:
        return self.S.columns(0, columns), self.AS.columns(0, columns)

    def rayleigh_ritz(self, which: Which) -> Ritz:
        """X ← the best Ritz vectors; P ← the part of them that is not in the X before."""
        small = self._projected(which, self.size)
        before, self.b = self.b, min(self.most, len(small.values))
        Z = torch.cat([small.Y[:, : self.b], _conjugate(small, before, self.b)], 1)
        self.S.rotate(Z)
        self.AS.rotate(Z)
        self.size = Z.shape[1]
        return self.projector.ritz(small, self._residuals(small.values[: self.b]))

    def _projected(self, which: Which, columns: int) -> RayleighRitz:
        try:
            return self.projector(*self._leading(columns), which)
        except NonFiniteError as error:
            if self.M is None:
                raise
            raise NonFiniteError(f"{error}; or those of the preconditioner, {self.M!r}") from None

    def refresh(self, ritz: Ritz, k: int, which: Which) -> Ritz:
        """Take the products of the first k Ritz vectors instead of combining those of S.

        And the Ritz values of their span, as those of S have the rounding of all combinations.
        """
        self.AS.put(0, self.products.columns(self.S.columns(0, k)))
        small = self._projected(which, k)
        for basis in (self.S, self.AS):
            basis.rotate(small.Y)
        values = torch.cat([small.values, ritz.values[k:]])
        residuals = self.projector.claimed(self._residuals(values))
        return dataclasses.replace(ritz, values=values, residuals=residuals)

    def _residuals(self, values: Tensor) -> Tensor:
        """The norms (b,) of R, which is made anew."""
        X, AX = self._leading(self.b)
        self.R = X[:, :0]  # the memory is for the new one
        self.R, norms = residual_block(self.space, X, AX, values, self.projector.norm)
        return norms

    def expand(self, columns: Tensor) -> None:
        """W ← M R for these columns of R, orthonormal to [X, P] and in itself, and A W.

        Nothing is read back from the device: columns with no direction of their own become zero.
        """
        W = self.R[:, columns.to(self.R.device)]
        if self.M is not None:
            W = self.M.matmat(W.to(self.M.dtype)).to(W.dtype)
        lengths = self.space.norm(W)
        W = (W * torch.where(lengths > 0, 1 / lengths, 0.0).to(real_dtype(W))).mT.contiguous().mT
        for threshold in (self.threshold, IN_SPAN):  # "Twice is enough" (Parlett 1980, §6.9)
            self.S.project(W, self.size)
            orthonormalize(self.space, W, threshold)
        AW = self.products.columns(W)
        self.S.put(self.size, W)
        self.AS.put(self.size, AW)
        self.size += W.shape[1]


def _conjugate(small: RayleighRitz, before: int, b: int) -> Tensor:
    """Coefficients of P: b Ritz vectors without their part in X, made orthogonal to all b.

    In coordinates of the orthonormal basis S F, X has the first: ``before``.
    """
    Y = small.vectors[:, :b]
    C = Y.clone()
    C[:before] = 0
    C = normalize(C, dim=0, eps=_TINY)
    for _ in range(2):
        C = C - Y @ (Y.mH @ C)
    U, sigma, _ = torch.linalg.svd(C, full_matrices=False)
    P: Tensor = small.F @ U[:, sigma > _PARALLEL]
    return P
