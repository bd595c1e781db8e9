"""Losses that compare real outputs with real targets: squares, Huber's, and given variances."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlinop.batches import Batch
from torchlinop.errors import DataError, LossShapeError, OptionError
from torchlinop.losses.elementwise import ElementwiseLikelihood, ElementwiseLoss
from torchlinop.losses.targets import anywhere, variance_of


@dataclass(eq=False, kw_only=True)
class MeanSquaredError(ElementwiseLikelihood):
    """φ = (f − y)²: Gaussian with variance ½, as ``torch.nn.MSELoss``."""

    def phi(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return (f - y).square()

    def slope(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return 2 * (f - y)

    def curvature(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return torch.full_like(f, 2)

    def information(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return torch.full_like(f, 2)

    def drawn_slope(self, f: Tensor, y: Tensor, batch: Batch, uniform: Tensor) -> Tensor:
        return -math.sqrt(2) * _normal_quantile(uniform)


@dataclass(eq=False, kw_only=True)
class Huber(ElementwiseLoss):
    """φ = ½d² where |d| = |f − y| ≤ δ, and δ(|d| − ½δ) beyond, as ``torch.nn.HuberLoss``."""

    delta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_not_positive("delta", self.delta)

    def phi(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return _huber(f - y, self.delta)

    def slope(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return (f - y).clamp(-self.delta, self.delta)

    def curvature(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return ((f - y).abs() < self.delta).to(f.dtype)


@dataclass(eq=False, kw_only=True)
class SmoothL1(ElementwiseLoss):
    """φ = Huber's with δ = β, over β, as ``torch.nn.SmoothL1Loss``."""

    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_not_positive("beta", self.beta)

    def phi(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return _huber(f - y, self.beta) / self.beta

    def slope(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return ((f - y) / self.beta).clamp(-1, 1)

    def curvature(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return ((f - y).abs() < self.beta).to(f.dtype) / self.beta


@dataclass(eq=False, kw_only=True)
class GaussianNLL(ElementwiseLikelihood):
    """φ = ½ (log v + (f − y)²/v), as ``torch.nn.GaussianNLLLoss``.

    The variances are data, read from the batch: in the shape of the outputs, without their last
    axis, or with 1 there.

    Raises:
        DataError: a variance is negative.
    """

    variance: Callable[[Batch], Tensor] = variance_of
    full: bool = False  # adds the constant ½ log 2π
    eps: float = 1e-6  # variances below it are set to it

    def phi(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        v = self._v(f, batch)
        constant = math.log(2 * math.pi) if self.full else 0.0
        return (v.log() + (f - y).square() / v + constant) / 2

    def slope(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return (f - y) / self._v(f, batch)

    def curvature(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return 1 / self._v(f, batch)

    def information(self, f: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return 1 / self._v(f, batch)

    def drawn_slope(self, f: Tensor, y: Tensor, batch: Batch, uniform: Tensor) -> Tensor:
        return -_normal_quantile(uniform) / self._v(f, batch).sqrt()

    def _v(self, f: Tensor, batch: Batch) -> Tensor:
        v = self.variance(batch).detach()
        short = v.shape == f.shape[:-1] and v.shape != f.shape
        v = v[..., None] if short else v
        if v.shape not in (f.shape, (*f.shape[:-1], 1)):
            raise LossShapeError(
                f"expected variances of the outputs' shape {tuple(f.shape)}, or with 1 as last "
                f"axis, got {tuple(v.shape)}; reshape them"
            )
        if anywhere(v < 0):
            raise DataError(
                f"expected variances of 0 or more, got {float(v.min()):.4g}; if the batch holds "
                "their logarithms, give GaussianNLL variance=lambda batch: batch[2].exp()"
            )
        wide = torch.promote_types(f.dtype, v.dtype)
        return v.to(wide).clamp_min(self.eps).expand_as(f)


def _normal_quantile(uniform: Tensor) -> Tensor:
    z: Tensor = torch.special.ndtri(uniform)
    return z


def _huber(d: Tensor, delta: float) -> Tensor:
    inner = d.clamp(-delta, delta)
    return inner * (d - inner / 2)


def _refuse_not_positive(name: str, value: float) -> None:
    if not value > 0:
        raise OptionError(f"expected {name} to be positive, got {value!r}; pass 1.0, say")
