"""Any scalar function of the outputs as a loss, its derivatives by autograd."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchlinop.batches import Batch, count_samples, take
from torchlinop.derivatives import gradient_of
from torchlinop.diagnosis import refuse_silent_gaps
from torchlinop.errors import (
    DoubleBackwardError,
    LossShapeError,
    OptionError,
    SampleMixingError,
    WeightingError,
)
from torchlinop.losses.base import LossOfOutput, OutputMap, Terms
from torchlinop.objective import scalar
from torchlinop.weighting import Weighting, sample_weights

_PROBED = 4  # samples whose loss alone is compared with their part in the loss of all


@dataclass(eq=False)
class AutogradLoss(LossOfOutput):
    """``function(outputs, batch) -> scalar``; a loss term is a sample, along the first axis.

    The weight ω_i of a sample is its share of what the batch counts, so terms need a weighting.
    """

    function: Callable[[Tensor, Batch], Tensor]
    weighting: Weighting | None = field(default=None, repr=False)

    def with_weighting(self, weighting: Weighting) -> AutogradLoss:
        """The same loss with its samples weighted so."""
        return dataclasses.replace(self, weighting=weighting)

    def __call__(self, outputs: Tensor, batch: Batch) -> Tensor:
        return scalar(self.function(outputs, batch))

    def per_sample(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The loss of every sample alone: (N,), by N evaluations."""
        return torch.stack([self(*_one(outputs, batch, i)) for i in range(len(outputs))])

    def hessian(self, outputs: Tensor, batch: Batch) -> OutputMap:
        """``u ↦ ∇²L u`` through the graph of the gradient, built once.

        Raises:
            DoubleBackwardError: the loss has no second derivative.
        """
        f = outputs.detach().requires_grad_()
        with self._explained():
            gradient = gradient_of(lambda f: self._twice(f, batch), f, create_graph=True)

        def columns(U: Tensor, batched: bool) -> Tensor:
            (HU,) = torch.autograd.grad(
                gradient,
                f,
                U,
                retain_graph=True,
                is_grads_batched=batched,
                materialize_grads=True,
            )
            return HU

        def product(u: Tensor) -> Tensor:
            if not gradient.requires_grad:  # L is linear, or constant
                return u.zero_()
            with self._explained():
                if u.ndim == f.ndim:
                    return columns(u, batched=False)
                U = u.reshape(-1, *f.shape)
                try:
                    HU = columns(U, batched=True)
                except RuntimeError:  # some operation has no batching rule
                    HU = torch.stack([columns(column, batched=False) for column in U])
                return HU.view(u.shape)

        return product

    def terms(self, outputs: Tensor, batch: Batch) -> Terms:
        """Gradients of the samples' losses.

        Raises:
            WeightingError: the weighting is unknown.
            SampleMixingError: the loss is no sum over samples.
        """
        omega = self._omega(outputs, batch)
        rows = omega.view(-1, *[1] * (outputs.ndim - 1))
        gradient = self._gradient(outputs, batch)
        gradients = torch.where(rows == 0, 0, gradient / rows)
        self._refuse_mixing(gradients, omega, outputs, batch)
        return Terms(gradients, rows, tuple(range(1 - outputs.ndim, 0)))

    def root(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Columns ``√λ_c q_c`` from the eigenvectors of every sample's block; C products.

        Raises:
            SampleMixingError: the loss mixes samples.
            OptionError: a block is indefinite.
        """
        hessian = self.hessian(outputs, batch)
        samples, C = len(outputs), outputs[0].numel()
        _refuse_mixing_hessian(self, hessian, outputs)
        units = torch.eye(C, dtype=outputs.dtype, device=outputs.device)[:, None]
        units = units.expand(C, samples, C).reshape(C, *outputs.shape)
        blocks = hessian(units).view(C, samples, C).movedim(0, -1)
        blocks = blocks.to(torch.promote_types(blocks.dtype, torch.float32))
        eigenvalues, Q = torch.linalg.eigh((blocks + blocks.mT) / 2)
        if eigenvalues.min() < -_tolerance(outputs) * eigenvalues.abs().max():
            raise OptionError(
                f"{self!r} is not convex in the outputs (an eigenvalue is "
                f"{float(eigenvalues.min()):.3g}), so its Hessian there has no square root; "
                "use HessianOperator or GGNOperator"
            )
        S: Tensor = Q * eigenvalues.clamp_min(0).sqrt()[:, None]
        return S.movedim(-1, 0).reshape(C, *outputs.shape).to(outputs.dtype)

    def _twice(self, f: Tensor, batch: Batch) -> Tensor:
        loss = self(f, batch)
        refuse_silent_gaps(loss, {}, twice=True)
        return loss

    def _gradient(self, outputs: Tensor, batch: Batch) -> Tensor:
        return gradient_of(lambda f: self(f, batch), outputs)

    def _omega(self, outputs: Tensor, batch: Batch) -> Tensor:
        """ω_i: (N,)."""
        samples = count_samples(batch)
        if self.weighting is None or samples != len(outputs):
            raise WeightingError(
                f"expected a loss over samples whose weights are known, got {self!r} with "
                f"{len(outputs)} rows of outputs for {samples} samples; give the loss a weighting, "
                "and outputs with one row a sample"
            )
        return sample_weights(self.weighting, batch).to(outputs)

    def _refuse_mixing(
        self, gradients: Tensor, omega: Tensor, outputs: Tensor, batch: Batch
    ) -> None:
        probed = omega.nonzero()[:_PROBED, 0].tolist()
        if len(outputs) == 1 or not probed:
            return
        alone = torch.cat([self._gradient(*_one(outputs, batch, i)) for i in probed])
        defect = (gradients[probed] - alone).abs().max()
        size = torch.maximum(gradients[probed].abs().max(), alone.abs().max())
        if not defect <= _tolerance(outputs) * size:
            raise SampleMixingError(_mixes(self))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            gap = "derivative" in text and "not implemented" in text
            if not gap and "once_differentiable" not in text and "double backward" not in text:
                raise
            raise DoubleBackwardError(
                f"the loss {self!r} has no second derivative ({text.splitlines()[0]}); write it "
                "with torch operations, or give it a method hvp(outputs, batch, u)"
            ) from error


@dataclass(eq=False)
class WithHvp(AutogradLoss):
    """A function with a method ``hvp(outputs, batch, u)`` of its own, called column by column."""

    function: Any

    def hessian(self, outputs: Tensor, batch: Batch) -> OutputMap:
        f = outputs.detach()

        def product(u: Tensor) -> Tensor:
            columns = u.reshape(-1, *f.shape)
            with torch.enable_grad():  # it may differentiate
                products = [self._own(f, batch, column.clone()) for column in columns]
            return torch.stack(products).detach().view(u.shape)

        return product

    def _own(self, f: Tensor, batch: Batch, u: Tensor) -> Tensor:
        product: object = self.function.hvp(f, batch, u)
        if isinstance(product, Tensor) and product.shape == f.shape:
            return product
        came = tuple(product.shape) if isinstance(product, Tensor) else type(product).__name__
        raise LossShapeError(
            f"expected hvp(outputs, batch, u) of {self!r} to give the shape {tuple(f.shape)} of u "
            f"and the outputs, got {came}; reshape the product"
        )


def _one(outputs: Tensor, batch: Batch, i: int) -> tuple[Tensor, Batch]:
    return outputs[i : i + 1], take(batch, i, i + 1)


def _tolerance(outputs: Tensor) -> float:
    """Relative; half the digits, since kernels for one sample may round otherwise."""
    return float(torch.finfo(outputs.dtype).eps ** 0.5)


def _mixes(loss: LossOfOutput) -> str:
    return (
        f"the loss {loss!r} mixes samples: it is not the weighted sum of its samples' losses, so a "
        "per-sample matrix is not defined; use HessianOperator, or GGNOperator"
    )


def _refuse_mixing_hessian(loss: LossOfOutput, hessian: OutputMap, outputs: Tensor) -> None:
    """Refuse a Hessian that carries a direction in the first sample over to others."""
    u = torch.zeros_like(outputs)
    u[0] = torch.linspace(1, 2, u[0].numel(), dtype=u.dtype, device=u.device).view(u[0].shape)
    Hu = hessian(u).abs()
    if len(outputs) > 1 and Hu[1:].max() > _tolerance(outputs) * Hu.max():
        raise SampleMixingError(_mixes(loss))
