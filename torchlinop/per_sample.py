"""Whether every sample's outputs are its own: what matrices of per-sample gradients ask for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchlinop.batches import Batch, can_be_cut, count_samples, take, tensors, tree_map
from torchlinop.errors import SampleMixingError
from torchlinop.objective import LossFn, Objective, scalar

log = logging.getLogger("torchlinop")

Outputs = Callable[[nn.Module, Any], Tensor]


def refuse_mixed_samples(objective: Objective, of: Outputs) -> None:
    """Evaluate a sample of the first batch alone: its outputs must be those it has in the batch.

    Costs two forward passes of the first batch.

    Raises:
        SampleMixingError: batch statistics, or anything else, let samples depend on each other.
    """
    module = objective.model.module
    norms = [n for n, m in module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if objective.model.mode == "train":
        if norms:
            raise SampleMixingError(_mixed(f"BatchNorm {norms[0]} uses the batch in train mode"))
        return  # a sample alone has another dropout mask
    batch = next(iter(objective.data))[0]
    samples = count_samples(batch) or 1
    if samples == 1 or not can_be_cut(batch):
        return
    theta = objective.theta
    with objective.evaluating(0, batch, of) as f, torch.no_grad():
        together = f(theta)
    try:
        with objective.evaluating(0, take(batch, 0, 1), of) as f, torch.no_grad():
            alone = f(theta)
    except (ValueError, RuntimeError) as error:
        raise SampleMixingError(_mixed(f"a sample alone cannot be evaluated ({error})")) from error
    rows = len(together) // samples if together.ndim else 0
    if alone.shape == together[:rows].shape:
        defect = (alone - together[:rows]).abs().max()
        # Kernels for one row round otherwise; a dependence is seen at half the digits.
        if not defect <= torch.finfo(alone.dtype).eps ** 0.5 * together.abs().max():
            raise SampleMixingError(_mixed("a sample alone has other outputs than in its batch"))


def _mixed(reason: str) -> str:
    return (
        f"expected samples that do not depend on each other, but {reason}, so that per-sample "
        'gradients are not defined; use mode="eval", HessianOperator or GGNOperator'
    )


@dataclass(frozen=True)
class LossesOfSamples:
    """``(model, batch) -> (N,)``: the loss of every sample, as a batch of its own.

    All in one vectorised pass where the model allows it, otherwise one after another.
    """

    loss_fn: LossFn

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        try:
            return self._together(model, batch)
        except RuntimeError as error:
            log.info("samples are evaluated one by one: %s", str(error).splitlines()[0])
            return self._one_by_one(model, batch)

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
        parts = [take(batch, i, i + 1) for i in range(count_samples(batch) or 0)]
        return torch.stack([scalar(self.loss_fn(model, part)) for part in parts])


def _counts(tensor: Tensor, samples: int | None) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == samples
