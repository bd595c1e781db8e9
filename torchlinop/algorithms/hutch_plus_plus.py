"""tr A = tr(Qᵀ A Q) + E[gᵀ (I-P) A (I-P) g]: exact on the range P = Q Qᵀ of a sketch A S."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from torchlinop.algorithms.basis import inner
from torchlinop.algorithms.gram_schmidt import OrthonormalColumns
from torchlinop.algorithms.hutchinson import Estimate, of_independent
from torchlinop.algorithms.probes import WIDTH, Probes, forms, on_host
from torchlinop.algorithms.products import multiply
from torchlinop.operators.base import CurvatureOperator
from torchlinop.space import Distribution


class HutchPlusPlus:
    """Hutch++ (Meyer, Musco, Musco, Woodruff, SOSA 2021, Algorithm 1).

    A third of the products each for the sketch A S, for A Q, and for residual samples, which get
    what is left over. The standard error is that of the residual samples alone: given Q, the
    first term is exact and the second is a mean of independent samples, unbiased for every Q.
    Keeps a third as many vectors as products.
    """

    fewest: ClassVar[int] = 1
    vectors: ClassVar[float] = 1 / 3
    usual: ClassVar[Distribution] = "rademacher"

    def __init__(self, op: CurvatureOperator, distribution: Distribution, seed: int) -> None:
        self._op = op
        self._sketch = Probes(op.space, distribution, seed, 0)
        self._tests = Probes(op.space, distribution, seed, 1)
        self._basis = OrthonormalColumns(op.space)
        self._captured = torch.zeros((), dtype=torch.float64, device=op.device)  # tr(QᵀAQ)
        self._residuals = torch.zeros(0, dtype=torch.float64, device=op.device)
        self.matvecs = 0

    def spend(self, num_matvecs: int) -> None:
        """Go on until ``num_matvecs`` products are spent in all."""
        old, tested = self._basis.size, len(self._residuals)
        # At least two residual samples, as one has no standard error, and all that there are.
        rank = max(0, min(num_matvecs // 3, (num_matvecs - max(2, tested)) // 2))
        self._basis.reserve(rank)
        for S in self._sketch.chunks(old, rank):
            self._basis.extend(multiply(self._op, S))
        for start in range(old, rank, WIDTH):
            self._capture(start, min(start + WIDTH, rank))
        for G in self._tests.chunks(tested, num_matvecs - 2 * rank):
            residuals = forms(self._op, self._basis.project_out(G))
            self._residuals = torch.cat([self._residuals, residuals])
        self.matvecs = num_matvecs

    def estimate(self) -> Estimate:
        residuals, captured = on_host(self._op, self._residuals, self._captured)
        return of_independent(residuals, float(captured))

    def _capture(self, start: int, stop: int) -> None:
        """Move the directions Q of these columns from the residual to what is exact.

        Samples gᵀAg taken before become those of g - Q c with c = Qᵀg, without a product:
        ``gᵀAg - 2 cᵀ(AQ)ᵀg + cᵀ(QᵀAQ)c``.
        """
        space, Q = self._op.space, self._basis.Q[:, start:stop]
        Z = multiply(self._op, Q)
        H = inner(space, Q, Z)
        self._captured += H.trace()
        for first in range(0, len(self._residuals), WIDTH):
            part = slice(first, min(first + WIDTH, len(self._residuals)))
            G = self._basis.project_out(self._tests.columns(part.start, part.stop), start)
            C, ZG = inner(space, Q, G), inner(space, Z, G)
            self._residuals[part] += (C * (H @ C - 2 * ZG)).sum(0)


class NonAdaptiveHutchPlusPlus:
    """NA-Hutch++ (Meyer et al. 2021, Algorithm 2): no product waits for another one.

    ``tr(Z M Wᵀ) + mean over g of gᵀ(A - Z M Wᵀ)g`` with W = A S, Z = A R and M the pseudoinverse of
    SᵀZ. Two to five times less accurate than Hutch++ at equal cost. Keeps three quarters as many
    vectors as products.
    """

    fewest: ClassVar[int] = 8
    vectors: ClassVar[float] = 3 / 4
    usual: ClassVar[Distribution] = "rademacher"

    def __init__(self, op: CurvatureOperator, distribution: Distribution, seed: int) -> None:
        self._op = op
        self._S, self._R, self._G = (Probes(op.space, distribution, seed, i) for i in range(3))
        self._W: list[Tensor] = []
        self._Z: list[Tensor] = []
        self._forms: list[Tensor] = []
        self._widths = (0, 0, 0)
        self.matvecs = 0

    def spend(self, num_matvecs: int) -> None:
        """Go on until ``num_matvecs`` products are spent in all."""
        r = num_matvecs // 2
        g = max(self._widths[2], num_matvecs - r - num_matvecs // 4)
        widths = (num_matvecs - r - g, r, g)
        for products, probes, old, new in (
            (self._W, self._S, self._widths[0], widths[0]),
            (self._Z, self._R, self._widths[1], widths[1]),
        ):
            products.extend(multiply(self._op, X) for X in probes.chunks(old, new))
        for G in self._G.chunks(self._widths[2], g):
            self._forms.append(forms(self._op, G))
        self._widths = widths
        self.matvecs = num_matvecs

    def estimate(self) -> Estimate:
        inner_of = self._op.space.inner
        W, Z = torch.cat(self._W, dim=1), torch.cat(self._Z, dim=1)
        s, r, g = self._widths
        SZ = torch.cat([inner_of(S, Z) for S in self._S.chunks(0, s)]).double()
        GZ = torch.cat([inner_of(G, Z) for G in self._G.chunks(0, g)]).double()
        GW = torch.cat([inner_of(G, W) for G in self._G.chunks(0, g)]).double()
        WZ = inner_of(W, Z).double()
        SZ, GZ, GW, WZ, GAG = on_host(self._op, SZ, GZ, GW, WZ, torch.cat(self._forms))
        # Singular values below the rounding of the products say nothing.
        M = torch.linalg.pinv(SZ, rtol=r * torch.finfo(self._op.dtype).eps)
        return of_independent(GAG - ((GZ @ M) * GW).sum(1), float((M @ WZ).trace()))
