"""F = Σ_n ω_n g_n g_nᵀ, where g_n is the gradient of loss term n with the targets of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, Unpack

import torch
from torch import Tensor, nn

from torchlinop.batches import Batch, count_samples
from torchlinop.from_model import ObjectiveOptions, objective_from_model, output_objective
from torchlinop.losses.base import LossOfOutput, OutputMap
from torchlinop.losses.functions import refuse_unfit_function
from torchlinop.losses.of_model import ForwardFn, LossOfModel
from torchlinop.losses.recognition import loss_of_output
from torchlinop.objective import Objective, scalar
from torchlinop.operators.base import LinearCombination
from torchlinop.operators.gauss_newton import GaussNewtonProducts
from torchlinop.operators.gradient_outer import OuterProductOperator
from torchlinop.operators.of_objective import ObjectiveOperator, ProductOptions, planned
from torchlinop.per_sample import (
    LossesOfSamples,
    refuse_mixed_samples,
    refuse_mixing_loss,
    refuse_unexplained_loss,
)
from torchlinop.weighting import Weighting, sample_weights


class TermMetric(Protocol):
    """``M = Σ_n ω_n g_n g_nᵀ`` on outputs, and ``Σ_n ω_n``."""

    def __call__(self, outputs: Tensor, batch: Batch, start: int) -> OutputMap: ...
    def total(self, outputs: Tensor, batch: Batch) -> Tensor: ...


class EmpiricalFisherOperator(ObjectiveOperator):
    """The empirical Fisher matrix: the second moment of the gradients of the loss terms.

    The loss is ``Σ_n ω_n ℓ_n`` and the matrix ``Σ_n ω_n ∇ℓ_n ∇ℓ_nᵀ``. With a loss of outputs, a
    term is what the loss is a mean over: a sample, or a token of a sequence; ℓ_n is summed over
    the outputs of a term, so that for a mean squared error over (N, C) entries, ω_n = 1/(NC) and
    the matrix is C times that of the per-sample means. Class weights are part of ℓ_n. With a
    ``loss_fn(model, batch)`` a term is a sample, and ω_n its share of the mean.

    Args:
        model, dataloader: as for ``HessianOperator``.
        loss_fn: ``(model, batch) -> scalar``, or the losses (N,) of all terms, of which the mean
            is meant; or the ``forward_fn`` of a ``GGNOperator``, if ``loss_of_output_fn`` is given.
        loss_of_output_fn: as for ``GGNOperator``.
        per_sample: False takes batches for terms: ``Σ_b share_b g_b g_bᵀ``, which depends on
            how the data are cut.
        **options: see ``ProductOptions``.

    Costs as much as ``GGNOperator``, and some forward passes of the first batch more to build, to
    see that samples are independent; the matrix of all gradients is never formed. With a scalar
    ``loss_fn``, samples go through the model in one vectorised pass, or one by one where an
    operation cannot be vectorised.

    Raises:
        SampleMixingError: samples depend on each other.
        TorchlinopError: as ``GGNOperator``.

    Source: Kunstner, Hennig, Balles, Limitations of the empirical Fisher approximation, NeurIPS
    (2019), equation 3.
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[Batch],
        loss_fn: ForwardFn,
        loss_of_output_fn: Any = None,
        *,
        per_sample: bool = True,
        **options: Unpack[ProductOptions],
    ) -> None:
        plan, rest = planned(options)
        name = "loss_fn" if loss_of_output_fn is None else "forward_fn"
        refuse_unfit_function(name, loss_fn)
        if not per_sample:
            pieces = _of_batches(model, dataloader, loss_fn, loss_of_output_fn, rest)
        elif loss_of_output_fn is None:
            pieces = _of_samples(model, dataloader, loss_fn, rest)
        else:
            pieces = _of_terms(model, dataloader, loss_fn, loss_of_output_fn, rest)
        objective, self._outputs, self._terms = pieces
        work = GaussNewtonProducts(plan.derivative, self._outputs, self._terms)
        super().__init__(objective, work, plan, positive_semidefinite=True)

    def total_weight(self) -> float:
        """Σ_n ω_n: 1 for a mean over terms. Costs a forward pass."""

        def term(b: int, batch: Batch) -> Tensor:
            with self.objective.evaluating(b, batch, self._outputs) as f, torch.no_grad():
                return self._terms.total(f(self.objective.theta), batch).clone()

        return float(self.objective.mean(term, self.objective.theta.new_zeros(())))


Pieces = tuple[Objective, ForwardFn, TermMetric]


def _of_terms(
    model: nn.Module,
    dataloader: Iterable[Batch],
    forward: ForwardFn,
    loss_of_output_fn: Any,
    options: ObjectiveOptions,
) -> Pieces:
    """Terms of a loss of outputs, whose gradients go back through the outputs."""
    objective = output_objective(
        model, dataloader, forward, loss_of_output_fn, of_samples=True, **options
    )
    refuse_mixed_samples(objective, objective.function.outputs)
    refuse_mixing_loss(objective)
    return objective, objective.function.outputs, TermGradients(objective.function.loss)


def _of_samples(
    model: nn.Module, dataloader: Iterable[Batch], loss_fn: ForwardFn, options: ObjectiveOptions
) -> Pieces:
    """Losses of samples: those that ``loss_fn`` returns, or that of every sample alone."""
    mean = MeanOfLosses(loss_fn)
    objective = objective_from_model(model, dataloader, mean, of_samples=True, **options)
    batch = next(iter(objective.data))[0]
    with objective.evaluating(0, batch, loss_fn) as f, torch.no_grad():
        losses = f(objective.theta)
    if gives_terms(losses, batch):
        refuse_mixed_samples(objective, loss_fn)
        return objective, loss_fn, Losses(mean.weights)
    samples = LossesOfSamples(loss_fn, objective.data.weighting)
    refuse_unexplained_loss(objective, samples)
    return objective, samples, Losses(samples.weights)


def gives_terms(loss: Tensor, batch: Batch) -> bool:
    """Whether a loss is the losses of terms, and no scalar, which may have the shape (1,)."""
    return loss.ndim == 1 and (loss.numel() > 1 or count_samples(batch) == 1)


def _of_batches(
    model: nn.Module,
    dataloader: Iterable[Batch],
    loss_fn: ForwardFn,
    loss_of_output_fn: Any,
    options: ObjectiveOptions,
) -> Pieces:
    """One loss a batch."""
    if loss_of_output_fn is not None:
        loss_fn = LossOfModel(loss_fn, loss_of_output(loss_of_output_fn))
    mean = MeanOfLosses(loss_fn)
    objective = objective_from_model(model, dataloader, mean, **options)
    objective.data.refuse_reordering()
    return objective, mean, Losses(_ones)


def _ones(losses: Tensor, batch: Batch) -> Tensor:
    return torch.ones_like(losses)


@dataclass(frozen=True)
class MeanOfLosses:
    """``loss_fn``, or the mean of the losses (N,) that it returns."""

    loss_fn: ForwardFn

    @property
    def weighting(self) -> Weighting | None:
        """What a batch counts, if ``loss_fn`` knows."""
        return getattr(self.loss_fn, "weighting", None)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        loss = self.loss_fn(model, batch)
        if isinstance(loss, Tensor) and gives_terms(loss, batch):
            return (self.weights(loss, batch) * loss).sum()
        return scalar(loss)

    def weights(self, losses: Tensor, batch: Batch) -> Tensor:
        """ω_i (N,), the same for all unless ``loss_fn`` knows what a sample counts."""
        if self.weighting is None:
            return losses.new_full(losses.shape, 1 / len(losses))
        return sample_weights(self.weighting, batch).to(losses)


@dataclass(frozen=True)
class TermGradients:
    """Outputs of the model: ``M = Σ_n ω_n g_n g_nᵀ`` with g_n = ∂ℓ_n/∂outputs."""

    loss: LossOfOutput

    def __call__(self, outputs: Tensor, batch: Batch, start: int) -> OutputMap:
        return self.loss.terms(outputs, batch).outer()

    def total(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Σ_n ω_n."""
        return self.loss.terms(outputs, batch).total


@dataclass(frozen=True)
class Losses:
    """Outputs that are losses: ``M = diag(ω)``."""

    weights: Callable[[Tensor, Batch], Tensor]  # (losses, batch) -> ω

    def __call__(self, outputs: Tensor, batch: Batch, start: int) -> OutputMap:
        weights = self.weights(outputs, batch)
        return lambda u: u.mul_(weights)

    def total(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Σ_n ω_n."""
        return self.weights(outputs, batch).sum()


class GradientCovarianceOperator(LinearCombination):
    """``Σ_n ω_n (∇ℓ_n − ḡ)(∇ℓ_n − ḡ)ᵀ`` with ḡ the weighted mean gradient of the loss terms.

    The noise of stochastic gradients: the empirical Fisher matrix less ``∇L ∇Lᵀ / Σ_n ω_n``.

    Args: as for ``EmpiricalFisherOperator``. Costs a gradient and a forward pass more to build.
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[Batch],
        loss_fn: ForwardFn,
        loss_of_output_fn: Any = None,
        *,
        per_sample: bool = True,
        **options: Unpack[ProductOptions],
    ) -> None:
        second_moment = EmpiricalFisherOperator(
            model, dataloader, loss_fn, loss_of_output_fn, per_sample=per_sample, **options
        )
        g = second_moment.gradient()
        outer = OuterProductOperator(g, second_moment.layout)
        super().__init__([(1.0, second_moment), (-1 / second_moment.total_weight(), outer)])
        self.positive_semidefinite = second_moment.positive_semidefinite
        self.description = second_moment.description
        self.notes = second_moment.notes
