"""Whether every sample's outputs are its own: what matrices of per-sample gradients ask for."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchlinop.batches import (
    Batch,
    can_be_cut,
    count_samples,
    split,
    take,
    tensors,
    tree_map,
)
from torchlinop.checkpointing import noticed_packing
from torchlinop.dtypes import coarsest
from torchlinop.errors import SampleMixingError
from torchlinop.finiteness import refuse_non_finite_outputs
from torchlinop.from_model import OutputObjective
from torchlinop.losses.of_model import ForwardFn
from torchlinop.objective import LossFn, Objective, scalar
from torchlinop.weighting import Weighting, sample_weights

log = logging.getLogger("torchlinop")


def refuse_mixed_samples(objective: Objective, of: ForwardFn) -> None:
    """Evaluate samples alone: their outputs must be those they have in their batch.

    Asked of the first and last sample of one batch, and of every sample of all batches if it has
    several rows of outputs, whose number might differ. Costs three forward passes of a batch, or
    a forward pass of every sample.

    Raises:
        SampleMixingError: batch statistics, or anything else, let samples depend on each other.
        NonFiniteError: the outputs are NaN or infinite.
    """
    refuse_batch_statistics(objective)
    if objective.model.mode == "train":
        return  # a sample alone has another dropout mask
    for b, (batch, _) in enumerate(objective.data):
        samples = count_samples(batch) or 1
        if samples == 1 or not can_be_cut(batch):
            continue
        if _probe(objective, of, b, batch, samples) == 1:
            return


def _probe(objective: Objective, of: ForwardFn, b: int, batch: Batch, samples: int) -> int:
    """The rows of outputs of a sample, which are the same alone and in the batch."""
    with objective.evaluating(b, batch, of) as f, torch.no_grad():
        together = f(objective.theta)
    refuse_non_finite_outputs(together, b)
    rows = len(together) // samples if together.ndim else 0
    if rows == 0 or len(together) % samples:
        shape = tuple(together.shape)
        raise SampleMixingError(_mixed(f"{samples} samples have outputs of shape {shape}"))
    for i in range(samples) if rows > 1 else (0, samples - 1):
        try:
            with objective.evaluating(b, take(batch, i, i + 1), of) as f, torch.no_grad():
                alone = f(objective.theta)
        except (ValueError, RuntimeError) as error:
            raise SampleMixingError(
                _mixed(f"a sample alone cannot be evaluated ({error})")
            ) from error
        within = together[rows * i : rows * (i + 1)]
        if alone.shape != within.shape:
            shapes = f"of shape {tuple(within.shape)} in its batch, {tuple(alone.shape)} alone"
            raise SampleMixingError(_mixed(f"a sample has outputs {shapes}"))
        # Kernels for one row round otherwise; a dependence is seen at half the digits.
        tolerance = torch.finfo(coarsest([alone.dtype, objective.layout.precision])).eps ** 0.5
        if not (alone - within).abs().max() <= tolerance * together.abs().max():
            raise SampleMixingError(_mixed("a sample alone has other outputs than in its batch"))
    return rows


def refuse_batch_statistics(objective: Objective) -> None:
    """Raise SampleMixingError for BatchNorm in train mode."""
    for name, module in objective.model.module.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and objective.model.mode == "train":
            raise SampleMixingError(_mixed(f"BatchNorm {name} uses the batch in train mode"))


def refuse_mixing_loss(objective: OutputObjective) -> None:
    """Ask for the terms of the first batch, which a loss has only if its samples add up to it.

    Raises:
        SampleMixingError: they do not.
    """
    batch = next(iter(objective.data))[0]
    with objective.evaluating(0, batch, objective.function.outputs) as f:
        objective.function.loss.terms(f(objective.theta).detach(), batch)


def refuse_unexplained_loss(objective: Objective, losses: LossesOfSamples) -> None:
    """The losses of the samples of the first batch, weighted, must add up to that of the batch.

    Raises:
        SampleMixingError: they do not.
    """
    refuse_batch_statistics(objective)
    batch = next(iter(objective.data))[0]
    with objective.evaluating(0, batch) as f, torch.no_grad():
        whole = f(objective.theta)
    try:
        with objective.evaluating(0, batch, losses) as f, torch.no_grad():
            alone = f(objective.theta)
    except (ValueError, RuntimeError) as error:
        raise SampleMixingError(_mixed(f"a sample alone cannot be evaluated ({error})")) from error
    weighted = losses.weights(alone, batch) * alone
    # Kernels for one sample round otherwise; a dependence is seen at half the digits.
    tolerance = torch.finfo(coarsest([whole.dtype, objective.layout.precision])).eps ** 0.5
    if not (whole - weighted.sum()).abs() <= tolerance * (whole.abs() + weighted.abs().sum()):
        raise SampleMixingError(
            _mixed(
                f"the loss of a batch is {float(whole):.6g}, the sum of those of its samples, "
                f"weighted by their {losses.weighting.unit}, {float(weighted.sum()):.6g}"
            )
        )


def _mixed(reason: str) -> str:
    return (
        f"expected samples that do not depend on each other, but {reason}, so that per-sample "
        "gradients are not defined; evaluate the model in eval mode, or use HessianOperator or "
        "GGNOperator"
    )


@dataclass(frozen=True)
class LossesOfSamples:
    """``(model, batch) -> (N,)``: the loss of every sample that counts, as a batch of its own.

    All in one vectorised pass where the model allows it, otherwise one after another, as with
    activation checkpointing, which would compute vectorised tensors again outside of that pass.
    """

    loss_fn: LossFn
    weighting: Weighting

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        batch = self._counted(batch)
        try:
            with noticed_packing() as packing:
                losses = self._together(model, batch)
        except RuntimeError as error:
            log.info("samples are evaluated one by one: %s", str(error).splitlines()[0])
            return self._one_by_one(model, batch)
        return self._one_by_one(model, batch) if packing else losses

    def weights(self, losses: Tensor, batch: Batch) -> Tensor:
        """ω_i (N,) in ``L(batch) = Σ_i ω_i L(sample i)``."""
        weights = sample_weights(self.weighting, batch)
        return weights[weights != 0].to(losses)

    def _counted(self, batch: Batch) -> Batch:
        """The batch without samples that hold no loss term: their own loss may be NaN."""
        weights = sample_weights(self.weighting, batch)
        if weights.all():
            return batch
        counting, samples = weights.nonzero()[:, 0], len(weights)
        return tree_map(lambda t: t[counting.to(t.device)] if _counts(t, samples) else t, batch)

    def _together(self, model: nn.Module, batch: Batch) -> Tensor:
        samples = count_samples(batch)

        def loss(*rows: Tensor) -> Tensor:
            row = iter(rows)
            sample = tree_map(lambda t: next(row)[None] if _counts(t, samples) else t, batch)
            return scalar(self.loss_fn(model, sample))

        columns = [t for t in tensors(batch) if _counts(t, samples)]
        losses: Tensor = torch.func.vmap(loss, randomness="different")(*columns)
        return losses

    def _one_by_one(self, model: nn.Module, batch: Batch) -> Tensor:
        return torch.stack([scalar(self.loss_fn(model, part)) for part in split(batch, 1)])


def _counts(tensor: Tensor, samples: int | None) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == samples
