"""tr A = mean over i of tr Â_i + ω_iᵀ (A-Â_i) ω_i, Â_i = AΩ (ΩᵀAΩ)⁻¹ ΩᵀA made without probe ω_i."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from torchlinop.algorithms.hutchinson import Estimate
from torchlinop.algorithms.leave_one_out import Rescaling, drop, jackknifed, rescaling
from torchlinop.algorithms.probes import on_host
from torchlinop.algorithms.products import Products
from torchlinop.algorithms.sketched_range import TINY, SketchedRange
from torchlinop.algorithms.symmetry_watch import SymmetryWatch
from torchlinop.errors import DefinitenessError
from torchlinop.space import Distribution

_NOISE = 1000  # roundings in a product, as of a network in float32,
_LARGEST_NOISE = 0.05  # but for very coarse dtypes


class XNysTrace:
    """XNysTrace (Epperly, Tropp, Webber, SIAM J. Matrix Anal. Appl. 45, 2024), where A ≥ 0.

    All products are A Ω. The Nyström approximation is that of A + ν I, where ν is as small as
    rounding allows. With probes on the sphere, or Gaussian ones, what is left of every probe is
    rescaled to its expected length. Keeps twice as many vectors as products.
    """

    fewest: ClassVar[int] = 4
    vectors: ClassVar[float] = 2.0
    usual: ClassVar[Distribution] = "sphere"

    def __init__(self, products: Products, distribution: Distribution, seed: int) -> None:
        self._products = products
        self._op = products.operator
        self._watch = SymmetryWatch(products, seed)
        self._sketch = SketchedRange(products, distribution, seed)
        self._rescaling = rescaling(distribution)

    @property
    def matvecs(self) -> int:
        return self._sketch.size

    def spend(self, num_matvecs: int) -> Iterator[None]:
        """Go on until ``num_matvecs`` products are spent in all."""
        yield from self._sketch.grow(num_matvecs)

    def estimate(self) -> Estimate:
        """The mean over the probes, and its jackknife standard error.

        Raises:
            SymmetryError: A is not symmetric; DefinitenessError: it has a negative eigenvalue.
        """
        space, Omega, Q = self._op.space, self._sketch.Omega, self._sketch.Q
        W, G, R = on_host(
            self._products, space.inner(Q, Omega), space.inner(Omega, Omega), self._sketch.R
        )
        n, k = space.size, len(R)
        H = W.T @ R  # ΩᵀAΩ
        self._watch.defect(H)
        if not R.any():  # of the zero matrix, ν would be all that is left
            return Estimate(R.new_zeros(k), 0.0)
        H = (H + H.T) / 2
        G_root = _inverse_root(G)
        nu = self._shift(torch.linalg.eigvalsh(G_root @ H @ G_root.T), R)
        # (A + ν I) Ω = Q (R + ν W) + ν (I - QQᵀ) Ω, whose two parts are orthogonal.
        F = torch.cat([R + nu * W, nu * _root(G - W.T @ W)])
        L = _inverse_root(H + nu * G)
        return jackknifed(_Nystrom(F @ L.T, L, G_root, nu * n, n - k, self._rescaling))

    def _shift(self, ritz_values: Tensor, R: Tensor) -> Tensor:
        """ν, the rounding of the products; at least what makes all Ritz values positive."""
        eps = torch.finfo(self._op.dtype).eps
        scale = R.norm() / self._op.size**0.5  # ‖AΩ‖_F / √n
        lowest, largest = ritz_values[0], ritz_values.abs().max()
        if lowest < -min(_NOISE * eps, _LARGEST_NOISE) * scale:
            raise DefinitenessError(
                f"a vector x with xᵀAx < 0, {float(lowest / largest):.1e} of the largest, was met "
                f'in {self._op!r}: expected no negative eigenvalue. Use method="xtrace"'
            )
        return torch.maximum(eps * scale, -2 * lowest).clamp_min(TINY)


def _root(M: Tensor) -> Tensor:
    """X with ``XᵀX = M``, of M ≥ 0 up to rounding."""
    eigenvalues, V = torch.linalg.eigh(M)
    root: Tensor = eigenvalues.clamp_min(0).sqrt()[:, None] * V.T
    return root


def _inverse_root(M: Tensor) -> Tensor:
    """X with ``XᵀX = M⁻¹``, of M > 0 up to rounding."""
    eigenvalues, V = torch.linalg.eigh(M)
    lowest = torch.finfo(M.dtype).eps * eigenvalues[-1]
    root: Tensor = eigenvalues.clamp_min(lowest).rsqrt()[:, None] * V.T
    return root


@dataclass(frozen=True)
class _Nystrom:
    """Â = B Bᵀ in an orthonormal basis, and what each probe adds: columns belong to probes."""

    B: Tensor  # (2k, k)
    L: Tensor  # (k, p) LᵀL = (ΩᵀAΩ)⁻¹
    G: Tensor  # (k, p) GᵀG = (ΩᵀΩ)⁻¹
    shift: Tensor  # () the trace of ν I
    dimension: int  # of the complement of Ω
    rescaling: Rescaling

    def samples(self) -> Tensor:
        added = (self.B @ normalize(self.L, dim=0, eps=TINY)).square().sum(0)
        residuals = 1 / _squares(self.L)  # ωᵢᵀ (A - Âᵢ) ωᵢ; and without A, the length of
        left = 1 / _squares(self.G)  # ωᵢ outside of the other probes
        c = self.rescaling(self.dimension + 1, left)
        return self.B.square().sum() - added + c * residuals - self.shift

    def without(self, i: int) -> _Nystrom:
        """The approximation from all other probes, by one projection in each of two spaces."""
        u = normalize(self.L[:, i : i + 1], dim=0, eps=TINY)
        v = normalize(self.G[:, i : i + 1], dim=0, eps=TINY)
        L, G = drop(self.L, i), drop(self.G, i)
        return replace(
            self,
            B=self.B - (self.B @ u) @ u.T,
            L=L - u @ (u.T @ L),
            G=G - v @ (v.T @ G),
            dimension=self.dimension + 1,
        )


def _squares(X: Tensor) -> Tensor:
    return X.square().sum(0).clamp_min(TINY)
