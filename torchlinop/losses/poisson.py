"""Counts: Poisson distributions, given by their rates or by the logarithms of these."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlinop.batches import Batch
from torchlinop.losses.elementwise import ElementwiseLikelihood


@dataclass(eq=False, kw_only=True)
class PoissonNLL(ElementwiseLikelihood):
    """φ = e^f − y f: Poisson with rate e^f, as ``torch.nn.PoissonNLLLoss(log_input=True)``."""

    full: bool = False  # adds Stirling's approximation of log y!, a constant

    def phi(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return F.poisson_nll_loss(f, y, full=self.full, reduction="none")

    def slope(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return f.exp() - y

    def curvature(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return f.exp()

    def information(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return f.exp()

    def drawn_slope(self, f: Tensor, y: Tensor, batch: Batch, uniform: Tensor) -> Tensor:
        return f.exp() - poisson_quantile(f.exp(), uniform)


@dataclass(eq=False, kw_only=True)
class PoissonRateNLL(ElementwiseLikelihood):
    """φ = f − y log(f + ε): Poisson with rate λ = f + ε, as with ``log_input=False``."""

    full: bool = False
    eps: float = 1e-8

    def phi(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return F.poisson_nll_loss(
            f, y, log_input=False, full=self.full, eps=self.eps, reduction="none"
        )

    def slope(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return 1 - y / (f + self.eps)

    def curvature(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return y / (f + self.eps).square()

    def information(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return 1 / (f + self.eps)

    def drawn_slope(self, f: Tensor, y: Tensor, batch: Batch, uniform: Tensor) -> Tensor:
        rate = f + self.eps
        return 1 - poisson_quantile(rate, uniform) / rate


def poisson_quantile(rate: Tensor, uniform: Tensor) -> Tensor:
    """The smallest k with ``P(Y ≤ k) = Q(k+1, rate) ≥ uniform``, in float64, by bisection.

    The bracket holds all probabilities that a float64 distinguishes from 0 and 1: ten standard
    deviations, and what a small rate needs more. Its width halves 40 times, enough for rates up
    to 1e20.
    """
    rate, uniform = rate.double(), uniform.double()
    spread = 10 * rate.sqrt()
    below = (rate - spread - 1).floor().clamp_min(-1)
    above = (rate + spread + 40).ceil()
    for _ in range(40):
        middle = ((below + above) / 2).floor()
        reached = torch.special.gammaincc(middle + 1, rate) >= uniform
        reached = reached & (middle > below)
        above = torch.where(reached, middle, above)
        below = torch.where(reached, below, middle)
    return above
