"""tr A = tr(Qᵀ A Q) + E[gᵀ (I-P) A (I-P) g]: exact on the range P = Q Qᵀ of a sketch A S."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from torchlinop.algorithms.column_buffer import ColumnBuffer
from torchlinop.algorithms.gram_schmidt import OrthonormalColumns
from torchlinop.algorithms.hutchinson import Estimate, of_independent
from torchlinop.algorithms.probes import WIDTH, Probes, forms, on_host
from torchlinop.algorithms.products import Products
from torchlinop.space import Distribution


class _Split(NamedTuple):
    """tr A as the trace on the first columns of a basis Q, and samples of what is left."""

    rank: int
    captured: Tensor  # tr(QᵀAQ)
    magnitude: Tensor  # Σ |qᵀAq|
    residuals: Tensor  # (k,)


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

    def __init__(self, products: Products, distribution: Distribution, seed: int) -> None:
        space = products.operator.space
        self._products = products
        self._sketch = Probes(space, distribution, seed, 0)
        self._tests = Probes(space, distribution, seed, 1)
        self._basis = OrthonormalColumns(space)
        zero = torch.zeros(1, dtype=torch.float64, device=space.device)
        self._split = _Split(0, zero[0], zero[0], zero[:0])

    @property
    def matvecs(self) -> int:
        """Products in the estimate; 0 before the first residual sample."""
        tested = len(self._split.residuals)
        return tested and 2 * self._split.rank + tested

    def spend(self, num_matvecs: int) -> Iterator[None]:
        """Go on until ``num_matvecs`` products are spent in all."""
        tested = len(self._split.residuals)
        # At least two residual samples, as one has no standard error, and all that there are.
        rank = max(0, min(num_matvecs // 3, (num_matvecs - max(2, tested)) // 2))
        self._basis.reserve(rank)
        for S in self._sketch.chunks(self._split.rank, rank):
            yield
            self._basis.extend(self._products(S))
            self._split = self._deflated(self._basis.size)
        for G in self._tests.chunks(tested, num_matvecs - 2 * rank):
            yield
            residuals = forms(self._products, self._basis.project_out(G))
            old = self._split
            self._split = old._replace(residuals=torch.cat([old.residuals, residuals]))

    def estimate(self) -> Estimate:
        split = self._split
        residuals, captured, magnitude = on_host(
            self._products, split.residuals, split.captured, split.magnitude
        )
        found = of_independent(residuals, float(captured))
        return replace(found, magnitude=float(magnitude))

    def _deflated(self, rank: int) -> _Split:
        """The split with the directions Q up to this column moved from residual to captured.

        Samples gᵀAg taken before become those of g - Q c with c = Qᵀg, without a product:
        ``gᵀAg - 2 cᵀ(AQ)ᵀg + cᵀ(QᵀAQ)c``.
        """
        old, space = self._split, self._products.operator.space
        Q = self._basis.Q[:, old.rank : rank]
        Z = self._products(Q)
        H = space.inner(Q, Z)
        changes = [old.residuals[:0]]
        for G in self._tests.chunks(0, len(old.residuals)):
            G = self._basis.project_out(G, old.rank)  # noqa: PLW2901
            C, ZG = space.inner(Q, G), space.inner(Z, G)
            changes.append((C * (H @ C - 2 * ZG)).sum(0))
        return _Split(
            rank,
            old.captured + H.trace(),
            old.magnitude + H.diagonal().abs().sum(),
            old.residuals + torch.cat(changes),
        )


class NonAdaptiveHutchPlusPlus:
    """NA-Hutch++ (Meyer et al. 2021, Algorithm 2): no product waits for another one.

    ``tr(Z M Wᵀ) + mean over g of gᵀ(A - Z M Wᵀ)g`` with W = A S, Z = A R and M the pseudoinverse of
    SᵀZ. Two to five times less accurate than Hutch++ at equal cost. Keeps three quarters as many
    vectors as products.
    """

    fewest: ClassVar[int] = 8
    vectors: ClassVar[float] = 3 / 4
    usual: ClassVar[Distribution] = "rademacher"

    def __init__(self, products: Products, distribution: Distribution, seed: int) -> None:
        space = products.operator.space
        self._products = products
        self._S, self._R, self._G = (Probes(space, distribution, seed, i) for i in range(3))
        self._W, self._Z = ColumnBuffer(space), ColumnBuffer(space)
        self._forms: list[Tensor] = []
        self._widths = (0, 0, 0)

    @property
    def matvecs(self) -> int:
        return sum(self._widths)

    def spend(self, num_matvecs: int) -> Iterator[None]:
        """Go on until ``num_matvecs`` products are spent in all."""
        r = num_matvecs // 2
        g = max(self._widths[2], num_matvecs - r - num_matvecs // 4)
        s = num_matvecs - r - g
        for images, probes, k in ((self._W, self._S, s), (self._Z, self._R, r)):
            images.reserve(k)
            for X in probes.chunks(images.size, k):
                yield
                images.append(self._products(X))
        for G in self._G.chunks(self._widths[2], g):
            yield
            self._forms.append(forms(self._products, G))
        self._widths = (s, r, g)

    def estimate(self) -> Estimate:
        space = self._products.operator.space
        s, r, g = self._widths
        W, Z = self._W.columns[:, :s], self._Z.columns[:, :r]
        SZ = torch.cat([space.inner(S, Z) for S in self._S.chunks(0, s)])
        GZ = torch.cat([space.inner(G, Z) for G in self._G.chunks(0, g)])
        GW = torch.cat([space.inner(G, W) for G in self._G.chunks(0, g)])
        SZ, GZ, GW, GAG = on_host(self._products, SZ, GZ, GW, torch.cat(self._forms)[:g])
        U, sigma, Vh = torch.linalg.svd(SZ, full_matrices=False)
        # Singular values below the rounding of the products say nothing.
        told = sigma > r * torch.finfo(self._products.operator.dtype).eps * sigma[0]
        U, sigma, V = U[:, told], sigma[told], Vh[told].T
        # Z M Wᵀ = Σ (Z v) (W u)ᵀ / σ, and Z v and W u are as small as σ: of tr(M WᵀZ), in which
        # they are not combined, rounding divided by the smallest σ would be left.
        pairs = zip(U.split(WIDTH, 1), V.split(WIDTH, 1), strict=True)
        dots = [self._products.dots(W @ u.to(W), Z @ v.to(Z)) for u, v in pairs]
        captured = torch.cat(dots).cpu() / sigma
        residuals = GAG - ((GZ @ V) * (GW @ U) / sigma).sum(1)
        found = of_independent(residuals, float(captured.sum()))
        return replace(found, magnitude=float(captured.abs().sum()))
