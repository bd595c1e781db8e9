"""L = ω Σ_nc φ(f_nc, y_nc): losses that compare every entry of the outputs with its target.

A term is a datum with its last axis of outputs, so its gradient is φ' along that axis, and its
Hessian the diagonal matrix of φ''.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlinop.batches import Batch
from torchlinop.errors import DataError, LossShapeError, OptionError
from torchlinop.losses.base import LossOfOutput, OutputMap, Terms, Uniform
from torchlinop.losses.reduction import Reduction, weighting_of
from torchlinop.losses.targets import anywhere, own, targets_of, variance_of
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


def _normal_quantile(uniform: Tensor) -> Tensor:
    z: Tensor = torch.special.ndtri(uniform)
    return z


def _huber(d: Tensor, delta: float) -> Tensor:
    inner = d.clamp(-delta, delta)
    return inner * (d - inner / 2)


def _diagonal(D: Tensor) -> OutputMap:
    return lambda u: u.mul_(D)


def _like(weight: Tensor | None, f: Tensor) -> Tensor | None:
    return None if weight is None else weight.to(f)


def _refuse_not_positive(name: str, value: float) -> None:
    if not value > 0:
        raise OptionError(f"expected {name} to be positive, got {value!r}; pass 1.0, say")
