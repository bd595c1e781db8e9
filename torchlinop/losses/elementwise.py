"""L = ω Σ_nc φ(f_nc, y_nc): losses that compare every entry of the outputs with its target.

A term is a datum with its last axis of outputs, so its gradient is φ' along that axis, and its
Hessian the diagonal matrix of φ''.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchlinop.batches import Batch
from torchlinop.errors import LossShapeError
from torchlinop.losses.base import LossOfOutput, OutputMap, Terms, Uniform
from torchlinop.losses.reduction import Reduction, weighting_of
from torchlinop.losses.targets import targets_of
from torchlinop.weighting import Weighting


@dataclass(eq=False, kw_only=True)
class ElementwiseLoss(LossOfOutput):
    """A sum over entries, or their mean; a subclass writes φ and its derivatives.

    Outputs and targets of two dtypes are compared in the wider one, as torch does, and derivatives
    are rounded to that of the outputs. Targets of another shape are refused: torch would broadcast
    them silently.
    """

    # In the shape of the outputs.
    targets: Callable[[Batch], Tensor] = field(default=targets_of, repr=False)
    reduction: Reduction = "mean"
    weighting: Weighting | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.weighting = weighting_of(self.reduction, self._count, "target entries")

    @abstractmethod
    def phi(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        """φ(f, y) for every entry."""

    @abstractmethod
    def slope(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        """∂φ/∂f."""

    @abstractmethod
    def curvature(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        """∂²φ/∂f², not negative."""

    def __call__(self, outputs: Tensor, batch: Batch) -> Tensor:
        entries = self.phi(*self._pair(outputs, batch), batch)
        return entries.sum() if self.reduction == "sum" else entries.mean()

    def per_sample(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The loss of every sample alone: (N,)."""
        entries = self.phi(*self._pair(outputs, batch), batch).reshape(len(outputs), -1)
        return entries.sum(1) if self.reduction == "sum" else entries.mean(1)

    def hessian(self, outputs: Tensor, batch: Batch) -> OutputMap:
        f, y = self._data(outputs, batch)
        return _diagonal(self._omega(f) * self.curvature(f, y, batch))

    def terms(self, outputs: Tensor, batch: Batch) -> Terms:
        f, y = self._data(outputs, batch)
        return self._terms(self.slope(f, y, batch), outputs)

    def root(self, outputs: Tensor, batch: Batch) -> Tensor:
        f, y = self._data(outputs, batch)
        R = (self._omega(f) * self.curvature(f, y, batch)).expand_as(f).sqrt().to(outputs.dtype)
        return torch.diag_embed(R, dim1=0, dim2=-1) if f.ndim > 1 else R[None]

    def _terms(self, gradients: Tensor, outputs: Tensor) -> Terms:
        gradients = gradients.to(outputs.dtype)
        omega = gradients.new_tensor(self._omega(gradients))
        return Terms(gradients, omega, (-1,) if gradients.ndim > 1 else ())

    def _omega(self, f: Tensor) -> float:
        return 1.0 if self.reduction == "sum" else 1 / f.numel()

    def _data(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        f, y = self._pair(outputs, batch)
        return f.detach(), y.detach()

    def _pair(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Outputs f and targets y, in the wider of their dtypes."""
        targets = self.targets(batch)
        if targets.shape != outputs.shape:
            raise LossShapeError(
                f"expected targets of the outputs' shape {tuple(outputs.shape)}, got "
                f"{tuple(targets.shape)}, which torch would broadcast; reshape one of them"
            )
        wide = torch.promote_types(outputs.dtype, targets.dtype)
        return outputs.to(wide), targets.to(wide)

    def _count(self, batch: Batch) -> float:
        return float(self.targets(batch).numel())


@dataclass(eq=False, kw_only=True)
class ElementwiseLikelihood(ElementwiseLoss):
    """φ(f, y) = −log p(y | f) but for a constant, entries independent."""

    @abstractmethod
    def information(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        """E[φ'(f, ŷ)²] for ŷ drawn from p(· | f)."""

    @abstractmethod
    def drawn_slope(self, f: Tensor, y: Tensor, batch: Batch, uniform: Tensor) -> Tensor:
        """φ'(f, ŷ) for ŷ where the distribution function of p(· | f) is ``uniform``."""

    def fisher(self, outputs: Tensor, batch: Batch) -> OutputMap:
        f, y = self._data(outputs, batch)
        return _diagonal(self._omega(f) * self.information(f, y, batch))

    def sampled(self, outputs: Tensor, batch: Batch, uniform: Uniform) -> Terms:
        f, y = self._data(outputs, batch)
        return self._terms(self.drawn_slope(f, y, batch, uniform(f.shape).to(f.device)), outputs)


def _diagonal(D: Tensor) -> OutputMap:
    return lambda u: u.mul_(D)
