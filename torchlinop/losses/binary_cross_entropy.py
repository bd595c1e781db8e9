"""Independent binary labels: φ = −w (ρ y log σ(f) + (1−y) log σ(−f))."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlinop.batches import Batch
from torchlinop.losses.elementwise import ElementwiseLikelihood
from torchlinop.losses.targets import own


@dataclass(eq=False, kw_only=True)
class BinaryCrossEntropyWithLogits(ElementwiseLikelihood):
    """φ = −w (ρ y log σ(f) + (1−y) log σ(−f)), as ``torch.nn.BCEWithLogitsLoss``.

    Bernoulli with probability σ(f); w (ρ y + 1 − y) is a weight of the observed datum.
    """

    weight: Tensor | None = None  # w, broadcast to the outputs
    pos_weight: Tensor | None = None  # ρ, broadcast to the outputs

    def __post_init__(self) -> None:
        super().__post_init__()
        self.weight, self.pos_weight = own(self.weight), own(self.pos_weight)

    def phi(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            f, y, _like(self.weight, f), pos_weight=_like(self.pos_weight, f), reduction="none"
        )

    def slope(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        w, rho = self._weights(f)
        slope: Tensor = w * ((rho * y + 1 - y) * f.sigmoid() - rho * y)
        return slope

    def curvature(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return self._datum(f, y) * f.sigmoid() * (-f).sigmoid()

    def information(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return self.curvature(f, y, batch)

    def drawn_slope(self, f: Tensor, y: Tensor, batch: Batch, uniform: Tensor) -> Tensor:
        drawn = uniform > (-f).sigmoid()
        return self._datum(f, y).sqrt() * torch.where(drawn, -(-f).sigmoid(), f.sigmoid())

    def _weights(self, f: Tensor) -> tuple[Tensor, Tensor]:
        w, rho = _like(self.weight, f), _like(self.pos_weight, f)
        one = f.new_ones(())
        return one if w is None else w, one if rho is None else rho

    def _datum(self, f: Tensor, y: Tensor) -> Tensor:
        w, rho = self._weights(f)
        return w * (rho * y + 1 - y)


def _like(weight: Tensor | None, f: Tensor) -> Tensor | None:
    return None if weight is None else weight.to(f)
