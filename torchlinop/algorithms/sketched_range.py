"""A Ω = Q R for probes Ω, and the normals s_i in that range: s_i ⊥ A ω_j for all j but i."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from torchlinop.algorithms.column_buffer import ColumnBuffer
from torchlinop.algorithms.gram_schmidt import OrthonormalColumns
from torchlinop.algorithms.probes import Probes
from torchlinop.algorithms.products import Products
from torchlinop.algorithms.symmetry_watch import SymmetryWatch
from torchlinop.space import Distribution

# Keeps 1/σ finite. A larger floor, as eps of the vectors, would bias estimates: the singular
# values below it still order the directions by what they hold.
_FLOOR = 1e-14
TINY = torch.finfo(torch.float64).tiny


class SketchedRange:
    """Probes Ω (n, size) and the range of their products, A Ω = Q R, which grow.

    Keeps two vectors a probe.
    """

    def __init__(self, products: Products, distribution: Distribution, seed: int) -> None:
        space = products.operator.space
        self._products = products
        self._probes = Probes(space, distribution, seed, 0)
        self._drawn, self._basis = ColumnBuffer(space), OrthonormalColumns(space)
        self._R = torch.zeros(0, 0, dtype=torch.float64, device=space.device)
        self.size = 0  # of the blocks that are complete

    @property
    def Omega(self) -> Tensor:  # noqa: N802
        """The probes (n, size)."""
        return self._drawn.columns[:, : self.size]

    @property
    def Q(self) -> Tensor:  # noqa: N802
        """Orthonormal (or zero) columns (n, size)."""
        return self._basis.Q[:, : self.size]

    @property
    def R(self) -> Tensor:  # noqa: N802
        """An upper triangle (size, size)."""
        return self._R[: self.size, : self.size]

    def grow(self, k: int) -> Iterator[None]:
        """Use k probes in all, a product each; yields before every block of them."""
        for buffer in (self._drawn, self._basis):
            buffer.reserve(k)
        for Omega in self._probes.chunks(self.size, k):
            yield
            R = self._basis.extend(self._products(Omega))
            self._drawn.append(Omega)
            below = self._R.new_zeros(Omega.shape[1], self._R.shape[1])
            self._R = torch.cat([torch.cat([self._R, below]), R], dim=1)
            self.size = self._drawn.size


class RangeAndImage:
    """A Ω = Q R and Z = A Q, which grow. Keeps three vectors a probe, for two products."""

    def __init__(self, products: Products, distribution: Distribution, seed: int) -> None:
        self._products = products
        self._range = SketchedRange(products, distribution, seed)
        self._image = ColumnBuffer(products.operator.space)

    @property
    def size(self) -> int:
        """The number of probes whose products are all there."""
        return self._image.size

    @property
    def Omega(self) -> Tensor:  # noqa: N802
        """The probes (n, size)."""
        return self._range.Omega[:, : self.size]

    @property
    def Q(self) -> Tensor:  # noqa: N802
        """Orthonormal (or zero) columns (n, size)."""
        return self._range.Q[:, : self.size]

    @property
    def R(self) -> Tensor:  # noqa: N802
        """An upper triangle (size, size)."""
        return self._range.R[: self.size, : self.size]

    @property
    def Z(self) -> Tensor:  # noqa: N802
        """A Q (n, size)."""
        return self._image.columns

    def grow(self, k: int) -> Iterator[None]:
        """Use k probes in all; yields before every block of them."""
        self._image.reserve(k)
        for _ in self._range.grow(k):
            self._complete()
            yield
        self._complete()

    def _complete(self) -> None:
        if self._range.size > self.size:
            self._image.append(self._products(self._range.Q[:, self.size :]))


def normals(R: Tensor) -> Tensor:
    """S (k, k): unit vectors along the columns of R⁻ᵀ.

    ``Q (I - s_i s_iᵀ) Qᵀ`` projects onto the range of A Ω without column i.
    """
    U, sigma, Vh = torch.linalg.svd(R)
    largest = sigma[0].clamp_min(TINY)
    return normalize((U / (sigma / largest).clamp_min(_FLOOR)) @ Vh, dim=0)


def columns_dot(X: Tensor, Y: Tensor) -> Tensor:
    """``x_i · y_i`` of all columns, (k,)."""
    return (X * Y).sum(0)


def refuse_asymmetric(watch: SymmetryWatch, X: Tensor, Y: Tensor) -> None:
    """Raise SymmetryError unless X = Y to rounding, where these are ``(AU)ᵀV`` and ``Uᵀ(AV)``."""
    zero = torch.zeros_like(X)
    watch.defect(torch.cat([torch.cat([zero, X], dim=1), torch.cat([Y.T, zero], dim=1)]))
