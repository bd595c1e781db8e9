"""A Ω = Q R for probes Ω, and the normals s_i in that range: s_i ⊥ A ω_j for all j but i."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from torchlinop.algorithms.gram_schmidt import OrthonormalColumns
from torchlinop.algorithms.probes import Probes
from torchlinop.algorithms.products import multiply
from torchlinop.errors import SymmetryError
from torchlinop.operators.base import CurvatureOperator
from torchlinop.space import Distribution

# Keeps 1/σ finite. A larger floor, as eps of the vectors, would bias estimates: the singular
# values below it still order the directions by what they hold.
_FLOOR = 1e-14
_ASYMMETRIC = 0.1  # far above what rounding or finite differences do to a product
TINY = torch.finfo(torch.float64).tiny


class SketchedRange:
    """Probes Ω (n, k) and the range of their products, which grow. Keeps 2k vectors."""

    def __init__(self, op: CurvatureOperator, distribution: Distribution, seed: int) -> None:
        self._op = op
        self._probes = Probes(op.space, distribution, seed, 0)
        self._basis = OrthonormalColumns(op.space)
        self.Omega = self._basis.Q
        self.R = torch.zeros(0, 0, dtype=torch.float64, device=op.device)

    @property
    def Q(self) -> Tensor:  # noqa: N802
        """Orthonormal (or zero) columns (n, k)."""
        return self._basis.Q

    def grow(self, k: int) -> None:
        """Use k probes in all. Costs as many products as there are new ones."""
        old = self._basis.size
        Omega = self._probes.columns(old, k)
        R = self._basis.extend(multiply(self._op, Omega))
        self.R = torch.cat([pad(self.R, (0, 0, 0, k - old)), R], dim=1)
        self.Omega = torch.cat([self.Omega.mT, Omega.mT]).mT


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


def refuse_asymmetric(op: CurvatureOperator, X: Tensor, Y: Tensor) -> None:
    """Raise SymmetryError unless X ≈ Y, where these are ``(AU)ᵀV`` and ``Uᵀ(AV)``."""
    defect = float((X - Y).norm() / X.norm().clamp_min(TINY))
    if defect > _ASYMMETRIC:
        raise SymmetryError(
            f"(AU)^T V and U^T (AV) differ by {defect:.0e} of their norm, for {op!r}: expected a "
            'symmetric matrix. Call op.check(), or use method="hutchinson" or "hutch++"'
        )
