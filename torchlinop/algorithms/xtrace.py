"""tr A = mean over i of tr(P_i A P_i) + ω_iᵀ (I-P_i) A (I-P_i) ω_i, P_i made without probe ω_i."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from torchlinop.algorithms.basis import inner
from torchlinop.algorithms.hutchinson import Estimate
from torchlinop.algorithms.leave_one_out import (
    Rescaling,
    drop,
    jackknifed,
    rescaling,
    without_direction,
)
from torchlinop.algorithms.probes import on_host
from torchlinop.algorithms.products import multiply
from torchlinop.algorithms.sketched_range import (
    SketchedRange,
    columns_dot,
    normals,
    refuse_asymmetric,
)
from torchlinop.operators.base import CurvatureOperator
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

    def __init__(self, op: CurvatureOperator, distribution: Distribution, seed: int) -> None:
        self._op = op
        self._sketch = SketchedRange(op, distribution, seed)
        self._Z = self._sketch.Q
        self._rescaling = rescaling(distribution)
        self.matvecs = 0

    def spend(self, num_matvecs: int) -> None:
        """Go on until ``num_matvecs`` products are spent in all, or one less."""
        old, k = self._Z.shape[1], num_matvecs // 2
        if k > old:
            self._sketch.grow(k)
            Z = multiply(self._op, self._sketch.Q[:, old:])
            self._Z = torch.cat([self._Z.mT, Z.mT]).mT
        self.matvecs = 2 * k

    def estimate(self) -> Estimate:
        space, Q, Z, Omega = self._op.space, self._sketch.Q, self._Z, self._sketch.Omega
        H, W, T, R, squares = on_host(
            self._op,
            inner(space, Q, Z),
            inner(space, Q, Omega),
            inner(space, Z, Omega),
            self._sketch.R,
            space.norm(Omega).double() ** 2,
        )
        refuse_asymmetric(self._op, R, T)  # Qᵀ(AΩ) and (AQ)ᵀΩ
        H, S = (H + H.T) / 2, normals(R)
        dimension = space.size - len(H)
        return jackknifed(_InRange(H, S, W, T, squares, dimension, self._rescaling))


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
