"""tr A = mean over i of tr(P_i A P_i) + ω_iᵀ (I-P_i) A (I-P_i) ω_i, P_i made without probe ω_i."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from torchlinop.algorithms.hutchinson import Estimate
from torchlinop.algorithms.leave_one_out import (
    Rescaling,
    drop,
    jackknifed,
    rescaling,
    without_direction,
)
from torchlinop.algorithms.probes import on_host
from torchlinop.algorithms.products import Products
from torchlinop.algorithms.sketched_range import (
    RangeAndImage,
    columns_dot,
    normals,
    refuse_asymmetric,
)
from torchlinop.algorithms.symmetry_watch import SymmetryWatch
from torchlinop.space import Distribution


class XTrace:
    """XTrace (Epperly, Tropp, Webber, SIAM J. Matrix Anal. Appl. 45, 2024).

    Half of the products are A Ω = Q R, half are A Q; an odd one is not spent. With probes on the
    sphere, or Gaussian ones, every (I-P_i) ω_i is rescaled to its expected length ("resphering").
    Keeps 1.5 times as many vectors as products.
    """

    fewest: ClassVar[int] = 4
    vectors: ClassVar[float] = 3 / 2
    usual: ClassVar[Distribution] = "sphere"

    def __init__(self, products: Products, distribution: Distribution, seed: int) -> None:
        self._products = products
        self._watch = SymmetryWatch(products, seed)
        self._sketch = RangeAndImage(products, distribution, seed)
        self._rescaling = rescaling(distribution)

    @property
    def matvecs(self) -> int:
        return 2 * self._sketch.size

    def spend(self, num_matvecs: int) -> Iterator[None]:
        """Go on until ``num_matvecs`` products are spent in all, or one less."""
        yield from self._sketch.grow(num_matvecs // 2)

    def estimate(self) -> Estimate:
        sketch, space = self._sketch, self._products.operator.space
        Q, Z, Omega = sketch.Q, sketch.Z, sketch.Omega
        H, W, T, R, squares = on_host(
            self._products,
            space.inner(Q, Z),
            space.inner(Q, Omega),
            space.inner(Z, Omega),
            sketch.R,
            space.norm(Omega).double() ** 2,
        )
        refuse_asymmetric(self._watch, R, T)  # Qᵀ(AΩ) and (AQ)ᵀΩ
        H, S = (H + H.T) / 2, normals(R)
        dimension = space.size - len(H)
        found = jackknifed(_InRange(H, S, W, T, squares, dimension, self._rescaling))
        return replace(found, magnitude=float(torch.linalg.eigvalsh(H).abs().sum()))


@dataclass(frozen=True)
class _InRange:
    """All that XTrace asks for, in coordinates of Q: columns belong to probes."""

    H: Tensor  # (k, k) QᵀAQ
    S: Tensor  # (k, p) normals
    W: Tensor  # (k, p) QᵀΩ
    T: Tensor  # (k, p) (AQ)ᵀΩ = QᵀAΩ: rounded less than R, as Q is shorter than Ω
    squares: Tensor  # (p,) ‖ω‖²
    dimension: int  # of the complement of Q
    rescaling: Rescaling

    def samples(self) -> Tensor:
        sw = columns_dot(self.S, self.W)
        X = self.W - self.S * sw  # P_i ω_i
        residuals = columns_dot(X, self.H @ X - self.T) + columns_dot(self.S, self.T) * sw
        c = self.rescaling(self.dimension + 1, self.squares - columns_dot(X, X))
        return self.H.trace() - columns_dot(self.S, self.H @ self.S) + c * residuals

    def without(self, i: int) -> _InRange:
        """All in the complement of s_i: other normals lose their part along it."""
        s = self.S[:, i : i + 1]

        def deflated(X: Tensor) -> Tensor:
            return X - s @ (s.T @ X)

        W, T = (deflated(drop(X, i)) for X in (self.W, self.T))
        return replace(
            self,
            H=deflated(deflated(self.H).T),
            S=without_direction(self.S, i),
            W=W,
            T=T,
            squares=drop(self.squares, i),
            dimension=self.dimension + 1,
        )
