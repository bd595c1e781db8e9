"""A model, batches and a loss, and the same loss on all data in one piece for an oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[nn.Module, Any], Tensor]
Forward = Callable[[nn.Module, Any], Tensor]


def of_inputs(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """The model's outputs for the first part of a batch."""
    outputs: Tensor = model(batch[0])
    return outputs


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A language model's logits (N, T, V) for padded rows."""
    logits: Tensor = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits


@dataclass(frozen=True)
class Problem:
    """A model, batches and a loss, with the loss on all data in one piece for the oracle."""

    model: nn.Module
    batches: list[Any]
    loss_fn: Loss  # the mean over the loss terms of a batch
    full_batch: Any
    forward_fn: Forward = of_inputs
    criterion: nn.Module = field(default_factory=nn.CrossEntropyLoss)  # as in loss_fn

    def full_loss(self) -> Tensor:
        """The objective, evaluated at once by the model's own parameters."""
        return self.loss_fn(self.model, self.full_batch)

    def outputs(self) -> Tensor:
        """The outputs for all data at once, by the model's own parameters."""
        return self.forward_fn(self.model, self.full_batch)

    def loss_of_outputs(self, outputs: Tensor) -> Tensor:
        """The objective as a function of the outputs for all data."""
        loss: Tensor = self.criterion(outputs, *self.full_batch[1:])
        return loss

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of ``(inputs, labels)``; labels of -100 are left out."""
    return F.cross_entropy(model(batch[0]), batch[1])


def mean_squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error over all entries of ``(inputs, targets)``."""
    return F.mse_loss(model(batch[0]), batch[1])


def next_token_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the unmasked next tokens, in the precision of the model."""
    logits = logits_of(model, batch)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def hugging_face_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss a Hugging Face model computes itself, always in float32."""
    loss: Tensor = model(**batch).loss
    return loss


def in_batches(full: Any, *sizes: int) -> list[Any]:
    """A tuple or dict of tensors cut along the first axis into batches of the given sizes."""
    if isinstance(full, dict):
        columns = [t.split(list(sizes)) for t in full.values()]
        return [dict(zip(full, parts, strict=True)) for parts in zip(*columns, strict=True)]
    return list(zip(*(t.split(list(sizes)) for t in full), strict=True))


def unreduced(criterion: nn.Module, outputs: Tensor, *targets: Tensor) -> Tensor:
    """The loss terms (N,) of a torch loss: one a sample or token, summed over its outputs."""
    criterion = copy.copy(criterion)
    criterion.reduction = "none"  # type: ignore[assignment]
    losses: Tensor = criterion(outputs, *targets)
    if losses.ndim > 1 and not isinstance(criterion, nn.CrossEntropyLoss):
        losses = losses.sum(-1)
    return losses.flatten()


def supervised(
    model: nn.Module, full: tuple[Tensor, ...], sizes: tuple[int, ...], criterion: nn.Module
) -> Problem:
    """The problem of a torch loss between outputs and targets, on batches of these sizes."""

    def loss_fn(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        loss: Tensor = criterion(of_inputs(model, batch), *batch[1:])
        return loss

    return Problem(model, in_batches(full, *sizes), loss_fn, full, criterion=criterion)
