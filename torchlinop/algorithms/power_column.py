"""v ← A v / ‖A v‖ in the complement of columns: to an eigenvector, or to a plane of two."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinop.algorithms.basis import Basis
from torchlinop.algorithms.krylov_schur import Target
from torchlinop.algorithms.late_look import LateLook
from torchlinop.algorithms.orthogonal import IN_SPAN, orthonormalize, real_dtype, removed
from torchlinop.algorithms.products import Products
from torchlinop.algorithms.rayleigh_ritz import Projector, residual_block
from torchlinop.algorithms.unit_scale import UnitScale

_MOST = 1e30  # momentum in units of ‖A‖², as float32 holds it; of 1 on, nothing converges
_PLANE = 32  # products, after which the plane of v and its residual is looked at


class Column:
    """Power iteration in the complement of the first i columns of X.

    ``v₊`` and ``v`` are scaled by the same factor, and θ = vᵀ A v is of A without momentum: with
    it, θ would be λ − β.
    """

    def __init__(  # noqa: PLR0917  # internal: all that a column shares with the others
        self, products: Products, A: UnitScale, X: Basis, i: int, target: Target, beta: float,
        norm: Tensor,
    ) -> None:  # fmt: skip
        self.products, self.A, self.X, self.i = products, A, X, i
        self.target, self.beta = target, beta
        self.space = products.operator.space
        self.norm = norm  # the largest ‖A v‖ so far, below ‖A‖
        self.mirrored: tuple[float, float] | None = None

    def iterate(self, v: Tensor, max_iter: int, projector: Projector) -> None:
        """Until v is as accurate as asked, or as rounding permits."""
        self.v, self.before = v, torch.zeros_like(v)
        look = LateLook()
        allowed = self.products.matvecs + max_iter
        while True:
            done = bool(look(self.multiply()[None])[0])
            left = allowed - self.products.matvecs
            if done or not left or self.products.late:
                return
            if left > 1 and (max_iter - left) % _PLANE == 0 and self._settled(projector):
                return
            self._advance()

    def full_product(self) -> Tensor:
        """A v, with what of it lies in X."""
        return self.w + self.X.combine(self.h)

    def multiply(self) -> Tensor:
        """Take w = A v in the complement of X; say whether v is accurate, on the device."""
        self.w = self.products.columns(self.v)
        self.h = self.X.project(self.w, self.i)
        length = self.space.norm(self.w)
        self.norm = torch.maximum(self.norm, length[0])
        # Relative to ‖A v‖, as the squares of small entries are no normal numbers in float32.
        self.r = self.w * torch.where(length > 0, 1 / length, 0.0).to(real_dtype(self.w))
        cosine = removed(self.space, self.v, self.r)[0, 0].real
        self.residual = self.space.norm(self.r)[0] * length[0]
        return self._accurate(cosine * length[0])

    def _accurate(self, theta: Tensor) -> Tensor:
        eps, tol = self.target.eps, self.target.tol
        bound = tol * torch.maximum(theta.abs(), eps ** (2 / 3) * self.norm)
        # ``~(>)`` so that NaN comes to light.
        return ~(self.residual > torch.maximum(bound, 2 * eps * self.norm))

    def _advance(self) -> None:
        after = self.w
        if self.beta:
            # By the first product its scale is known; before it, nothing is subtracted.
            after = after.sub_(self.before, alpha=min(self.beta / self.A.scale**2, _MOST))
        length = self.space.norm(after)
        scale = torch.where(length > 0, 1 / length, 0.0).to(real_dtype(after))
        self.before = self.v * scale if self.beta else self.before
        self.v = torch.where(length > 0, after.mul_(scale), self.v)

    def _settled(self, projector: Projector) -> bool:
        """Whether the plane of v and r holds an eigenvector, which v then becomes.

        Costs one product and a transfer.
        """
        u = self.r
        for threshold in (0.0, IN_SPAN):
            self.X.project(u, self.i)
            removed(self.space, self.v, u)
            orthonormalize(self.space, u, threshold)
        Au = self.products.columns(u)
        h = self.X.project(Au, self.i)
        S, AS = torch.cat([self.v, u], 1), torch.cat([self.w, Au], 1)
        small = projector(S, AS, "LM")
        Y = small.Y.to(device=S.device, dtype=S.dtype)
        V, W = S @ Y, AS @ Y
        _, residuals = residual_block(self.space, V, W, small.values, projector.norm)
        rounding = 2 * projector.floor
        chosen = self._leading(small.values, float(residuals.sum()) + rounding)
        self.residual = residuals[chosen].to(S.device)
        settled = bool(self._accurate(small.values[chosen].to(S.device)))
        if settled:
            y = Y[:, chosen : chosen + 1]
            self.v, self.w = V[:, chosen : chosen + 1], W[:, chosen : chosen + 1]
            self.h = torch.cat([self.h, h], 1) @ y.to(h.dtype)
        else:
            self.mirrored = None
        return settled

    def _leading(self, values: Tensor, uncertainty: float) -> int:
        """The pair of the plane with the larger |θ|; the positive one of two mirrored."""
        if len(values) < 2 or float((values[0] + values[1]).abs()) > uncertainty:
            return 0
        self.mirrored = (float(values.max()), float(values.min()))
        return int(values.argmax())
