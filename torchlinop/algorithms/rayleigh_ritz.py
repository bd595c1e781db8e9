"""H Y = G Y Θ with H = S^H A S and G = S^H S: the eigenpairs of A as seen from the span of S."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlinop.algorithms.basis import inner
from torchlinop.algorithms.krylov_schur import Which, order_of
from torchlinop.algorithms.orthogonal import real_dtype
from torchlinop.algorithms.products import Products, roundoff, working_dtype
from torchlinop.errors import NonFiniteError
from torchlinop.space import VectorSpace

_CHECK_PRODUCTS = 6  # of operator.check()


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

    def __init__(self, products: Products, seed: int) -> None:
        operator = products.operator
        self.products, self.seed = products, seed
        self.eps = roundoff(operator.dtype)
        working = torch.finfo(working_dtype(operator.dtype)).eps
        # A projection this far from its transpose, relative to ‖A‖, is worth a closer look.
        self.suspicious = max(1000 * working, 20 * self.eps)
        self.symmetric = False  # as far as measured, whatever the noise
        self.norm = 0.0  # the largest |θ| so far, an estimate of ‖A‖ from below
        self.floor = 0.0  # what rounding and noise make of a residual

    def __call__(self, S: Tensor, AS: Tensor, which: Which) -> RayleighRitz:
        """The eigenpairs seen from the columns S (n, j), orthonormal up to rounding, or zero.

        The rounding is accounted for, so that it does not add up from one S to the next. One
        transfer from the device.

        Raises:
            NonFiniteError, SymmetryError: the products are not those of a symmetric matrix.
        """
        space = self.products.operator.space
        H, G = torch.stack([inner(space, S, AS), inner(space, S, S)]).cpu()
        self._refuse(H, G)
        alive = G.diagonal().real > 0.5
        L = torch.linalg.cholesky(G[alive][:, alive])
        F = torch.zeros(len(G), len(L), dtype=G.dtype)
        F[alive] = torch.linalg.inv(L.mH)
        values, vectors = torch.linalg.eigh(F.mH @ ((H + H.mH) / 2) @ F)
        self.norm = max(self.norm, float(values.abs().max()))
        self.floor = max(self.floor, 2 * self.eps * self.norm)
        order = order_of(values, which)
        return RayleighRitz(values[order], vectors[:, order], F)

    def _refuse(self, H: Tensor, G: Tensor) -> None:
        operator = self.products.operator
        if not bool(torch.isfinite(torch.stack([H, G])).all()):
            raise NonFiniteError(
                f"the products of {operator!r} (or of its preconditioner) hold NaN or infinity, "
                f"by product {self.products.matvecs}; look for them in the data and the parameters"
            )
        defect = float((H - H.mH).abs().max())
        scale = max(self.norm, float(torch.linalg.matrix_norm(H, 2)))
        if defect > self.suspicious * scale and not self.symmetric:
            self.products.count(_CHECK_PRODUCTS, _CHECK_PRODUCTS)
            operator.check(seed=self.seed, strict=True)
            self.symmetric = True
        self.floor = max(self.floor, defect)


def residual_block(
    space: VectorSpace, X: Tensor, AX: Tensor, values: Tensor, norm: float
) -> tuple[Tensor, Tensor]:
    """``(A X − X Θ) / ‖A‖`` (n, k) but for a power of two, and ``‖A x − θ x‖`` (k,) on the CPU.

    Squares of entries as small as those of a residual would not be normal numbers in float32.
    """
    unit = 2.0 ** math.frexp(norm)[1] if norm else 1.0
    R = AX / unit
    R -= X * (values / unit).to(device=X.device, dtype=real_dtype(X))
    return R, unit * space.norm(R).double().cpu()
