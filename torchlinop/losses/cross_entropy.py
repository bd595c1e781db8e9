"""L = −Σ_n ω_n Σ_c a_nc log p_nc with p = softmax(f): cross-entropy, whatever the targets.

Labels, probabilities, class weights and smoothing are one matrix of effective targets a_nc, with
row sums s_n. The gradient of a term is ``s_n p − a_n``, its Hessian ``s_n (diag p − p pᵀ)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlinop.batches import Batch
from torchlinop.errors import DataError, LossShapeError, OptionError
from torchlinop.losses.base import LossOfOutput, OutputMap, Terms, Uniform
from torchlinop.losses.fused_cross_entropy import Backend, cross_entropy_map
from torchlinop.losses.reduction import Reduction, weighting_of
from torchlinop.losses.targets import anywhere, own, targets_of
from torchlinop.weighting import IGNORED, Weighting


@dataclass(frozen=True)
class _Labels:
    """a_nc = (1−ε) w_y [c = y] + (ε/C) w_c, and zero in masked rows; never built."""

    labels: Tensor  # (*rows,) with 0 where masked
    counted: Tensor  # (*rows,) bool
    weight: Tensor  # (C,)
    smoothing: float

    @cached_property
    def of_label(self) -> Tensor:  # (*rows,) w_y, zero where masked
        return self.weight[self.labels] * self.counted

    @property
    def mass(self) -> Tensor:  # (*rows,) s_n
        smooth = self.smoothing * self.weight.mean()
        return (1 - self.smoothing) * self.of_label + smooth * self.counted

    @property
    def normaliser(self) -> Tensor:
        return self.of_label.sum()

    def subtract_from(self, P: Tensor) -> Tensor:
        """``P − A``, in place on P (*rows, C), zero in masked rows."""
        P.sub_(self.weight * (self.smoothing / len(self.weight)))
        P.scatter_add_(-1, self.labels[..., None], (self.smoothing - 1) * self.of_label[..., None])
        return P.mul_(self.counted[..., None])


@dataclass(frozen=True)
class _Probabilities:
    """a_nc = w_c ((1−ε) q_nc + ε/C)."""

    A: Tensor  # (*rows, C)

    @property
    def counted(self) -> Tensor:
        return torch.ones(self.A.shape[:-1], dtype=torch.bool, device=self.A.device)

    @property
    def mass(self) -> Tensor:
        return self.A.sum(-1)

    @property
    def normaliser(self) -> Tensor:
        return self.counted.sum().to(self.A.dtype)

    def subtract_from(self, P: Tensor) -> Tensor:
        return P.sub_(self.A)


@dataclass(eq=False, kw_only=True)
class CrossEntropy(LossOfOutput):
    """Softmax cross-entropy as ``torch.nn.functional.cross_entropy`` defines it.

    A mean over labels divides by the sum of their class weights, a mean over probabilities by
    their number of rows. Half-precision outputs are reduced in float32.

    The model's distribution of a term is the softmax, and the mass s_n (class weights, smoothing)
    a weight of the observed datum. So the Fisher matrix, its Monte Carlo estimates in the mean,
    and the Gauss-Newton matrix agree.

    Raises:
        OptionError: an option is none of its choices.
        LossShapeError: targets or class weights do not fit the outputs.
        DataError: a label is neither a class nor ``ignore_index``.
    """

    # Labels (*rows,), or probabilities in the shape of the outputs.
    targets: Callable[[Batch], Tensor] = field(default=targets_of, repr=False)
    weight: Tensor | None = None  # (C,)
    ignore_index: int = IGNORED
    label_smoothing: float = 0.0
    reduction: Reduction = "mean"
    class_axis: int = 1  # 1 as in torch, or -1 as language models have it
    fused: Backend = "auto"  # how products with the Hessian are computed
    unit: str = field(default="unmasked labels", repr=False)  # what a mean is over, for people
    weighting: Weighting | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.weight = own(self.weight)
        self.weighting = weighting_of(self.reduction, self._count, self.unit)
        if self.class_axis not in (1, -1):
            raise OptionError(
                f"expected class_axis to be 1 (as in torch) or -1, got {self.class_axis!r}; "
                "move the axis of the classes in forward_fn"
            )
        if not 0 <= self.label_smoothing <= 1:
            raise OptionError(
                f"expected label_smoothing between 0 and 1, got {self.label_smoothing!r}; "
                "pass 0.1, say"
            )

    def __call__(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self._loss(outputs, batch, self.reduction)

    def per_sample(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The loss of every sample alone: (N,), zero for samples that are masked altogether."""
        losses = self._loss(outputs, batch, "none").view(len(outputs), -1).sum(1)
        if self.reduction == "sum":
            return losses
        target = self._target(self._logits(outputs).detach(), outputs, batch)
        counts = target.counted if isinstance(target, _Probabilities) else target.of_label
        total = counts.view(len(outputs), -1).sum(1)
        return torch.where(total == 0, 0, losses / total)

    def hessian(self, outputs: Tensor, batch: Batch) -> OutputMap:
        axis = self._axis(outputs)
        logits = outputs.detach().movedim(axis, -1)
        target = self._target(logits, outputs, batch)
        product = cross_entropy_map(logits, self._omega(target) * target.mass, self.fused)
        return lambda u: product(u.movedim(axis, -1)).movedim(-1, axis)

    def fisher(self, outputs: Tensor, batch: Batch) -> OutputMap:
        """``u ↦ ∇²L u``: the logits are the natural parameters of the softmax."""
        return self.hessian(outputs, batch)

    def terms(self, outputs: Tensor, batch: Batch) -> Terms:
        P = self._softmax(outputs)
        target = self._target(P, outputs, batch)
        return self._terms(
            target.subtract_from(P.mul_(target.mass[..., None])), self._omega(target), outputs
        )

    def sampled(self, outputs: Tensor, batch: Batch, uniform: Uniform) -> Terms:
        P = self._softmax(outputs)
        target = self._target(P, outputs, batch)
        drawn = _drawn(P, uniform(P.shape[:-1]))
        P.scatter_add_(-1, drawn[..., None], P.new_full((), -1).expand(*drawn.shape, 1))
        return self._terms(P.mul_(target.mass.sqrt()[..., None]), self._omega(target), outputs)

    def root(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Columns ``√(ω_n s_n p_c) (e_c − p)``, for which ``Σ_c p_c (e_c−p)(e_c−p)ᵀ`` suffices."""
        P = self._softmax(outputs)
        target = self._target(P, outputs, batch)
        R = ((self._omega(target) * target.mass)[..., None] * P).sqrt()
        S = R.movedim(-1, 0)[..., None] * -P
        S.diagonal(dim1=0, dim2=-1).add_(R)
        return S.movedim(-1, self._axis(outputs)).to(outputs.dtype)

    def _axis(self, outputs: Tensor) -> int:
        """The axis of the classes counted from the end, where u has no axes in front."""
        if outputs.ndim < 2:
            raise LossShapeError(
                f"expected outputs with a sample axis and a class axis, got shape "
                f"{tuple(outputs.shape)}; add the axis in forward_fn"
            )
        return -1 if self.class_axis == -1 else 1 - outputs.ndim

    def _logits(self, outputs: Tensor) -> Tensor:
        """(*rows, C), in float32 at least."""
        return outputs.movedim(self._axis(outputs), -1).to(_precision(outputs))

    def _softmax(self, outputs: Tensor) -> Tensor:
        logits = outputs.detach().movedim(self._axis(outputs), -1)
        return logits.softmax(-1, dtype=_precision(outputs))

    def _target(self, logits: Tensor, outputs: Tensor, batch: Batch) -> _Labels | _Probabilities:
        targets = self._checked(outputs, logits.shape[:-1], batch)
        precision = _precision(logits)
        classes = logits.shape[-1]
        ones = torch.ones(classes, dtype=precision, device=logits.device)
        weight = ones if self.weight is None else self.weight.to(ones)
        smoothing = self.label_smoothing
        if targets.is_floating_point():
            Q = targets.detach().movedim(self._axis(outputs), -1).to(precision)
            return _Probabilities(weight * ((1 - smoothing) * Q + smoothing / classes))
        counted = targets != self.ignore_index
        return _Labels(targets.where(counted, 0), counted, weight, smoothing)

    def _omega(self, target: _Labels | _Probabilities) -> Tensor:
        """ω_n: (*rows,), zero in masked rows, even if all are."""
        counted = target.counted.to(target.mass.dtype)
        if self.reduction == "sum":
            return counted
        return torch.where(target.counted, counted / target.normaliser, 0)

    def _terms(self, gradients: Tensor, omega: Tensor, outputs: Tensor) -> Terms:
        axis = self._axis(outputs)
        gradients, omega = (
            t.movedim(-1, axis).to(outputs.dtype) for t in (gradients, omega[..., None])
        )
        return Terms(gradients, omega, (axis,))

    def _checked(self, outputs: Tensor, rows: torch.Size, batch: Batch) -> Tensor:
        """The targets; labels as integers that can index."""
        targets = self._labels_or_probabilities(batch)
        expected = outputs.shape if targets.is_floating_point() else rows
        if targets.shape != expected:
            kind = "probabilities" if targets.is_floating_point() else "labels"
            raise LossShapeError(
                f"expected {kind} of shape {tuple(expected)} for outputs of shape "
                f"{tuple(outputs.shape)}, got {tuple(targets.shape)}; give the targets such a "
                "shape, or class_axis=-1 if the classes are last"
            )
        classes = outputs.shape[self._axis(outputs)]
        if self.weight is not None and self.weight.shape != (classes,):
            raise LossShapeError(
                f"expected a class weight for each of {classes} classes, got weights of shape "
                f"{tuple(self.weight.shape)}; pass as many as the model has outputs"
            )
        if targets.is_floating_point():
            return targets
        self._refuse_outside(targets, classes)
        return targets.long()

    def _labels_or_probabilities(self, batch: Batch) -> Tensor:
        targets = self.targets(batch)
        if targets.is_floating_point() and targets.ndim < 2:
            raise LossShapeError(
                f"expected integer labels, or probabilities with a class axis, got targets of "
                f"{targets.dtype} and shape {tuple(targets.shape)}; pass labels.long()"
            )
        return targets

    def _refuse_outside(self, labels: Tensor, classes: int | None) -> None:
        """Labels that are no classes: negative ones would index from the end."""
        outside = labels < 0 if classes is None else (labels < 0) | (labels >= classes)
        outside = outside & (labels != self.ignore_index)
        if anywhere(outside):
            expected = "of 0 or more" if classes is None else f"from 0 to {classes - 1}"
            raise DataError(
                f"expected labels {expected}, or {self.ignore_index} where there is none, got "
                f"{int(labels[outside][0])}; correct the labels, or pass another ignore_index"
            )

    def _loss(self, outputs: Tensor, batch: Batch, reduction: str) -> Tensor:
        logits = self._logits(outputs)
        targets = self._checked(outputs, logits.shape[:-1], batch)
        if targets.is_floating_point():
            targets = targets.movedim(self._axis(outputs), -1).to(logits.dtype)
        return F.cross_entropy(
            # Rows in one axis: with the classes last in memory nothing is copied.
            logits.flatten(0, -2),
            targets.flatten(0, logits.ndim - 2),
            weight=None if self.weight is None else self.weight.to(logits),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=reduction,
        )

    def _count(self, batch: Batch) -> float:
        """What the mean divides by."""
        targets = self._labels_or_probabilities(batch)
        if targets.is_floating_point():
            return targets.numel() / targets.shape[self.class_axis]
        self._refuse_outside(targets, None if self.weight is None else len(self.weight))
        counted = targets[targets != self.ignore_index].long()
        if self.weight is None:
            return float(counted.numel())
        return float(self.weight.double().to(counted.device)[counted].sum())


def _precision(outputs: Tensor) -> torch.dtype:
    return torch.promote_types(outputs.dtype, torch.float32)


def _drawn(P: Tensor, uniform: Tensor) -> Tensor:
    """Classes (*rows,) drawn from rows of P (*rows, C) by inverting their distribution functions.

    The uniform numbers are stretched to the rounded total, and kept from rounding to zero, so that
    no class of probability zero is drawn.
    """
    distribution = P.cumsum(-1).contiguous()
    heights = uniform.to(distribution)[..., None] * distribution[..., -1:]
    heights = heights.clamp_min(torch.finfo(P.dtype).tiny)
    return torch.searchsorted(distribution, heights.contiguous())[..., 0]
