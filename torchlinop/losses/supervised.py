"""Losses and forward functions for batches of inputs and targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from torchlinop.batches import Batch
from torchlinop.losses.autograd import AutogradLoss
from torchlinop.losses.base import LossOfOutput
from torchlinop.losses.cross_entropy import CrossEntropy
from torchlinop.losses.of_model import LossOfModel
from torchlinop.losses.real_targets import MeanSquaredError
from torchlinop.losses.recognition import criterion as recognised
from torchlinop.losses.targets import INPUTS, TARGETS, named_parts, unclear
from torchlinop.weighting import Weighting


@runtime_checkable
class _PerSample(Protocol):
    @property
    def weighting(self) -> Weighting | None: ...
    def per_sample(self, outputs: Tensor, batch: Batch) -> Tensor: ...


def supervised_forward(model: nn.Module, batch: Batch) -> Tensor:
    """The model's outputs; its ``.logits`` if it gives such an object, as Hugging Face's do.

    The inputs are the first part of a tuple or list, or the part named ``inputs``, ``input``,
    ``x``, ``image`` or ``images``; otherwise all parts but the labels, as keywords.

    Raises:
        BatchError: there is nothing that looks like inputs and targets.
    """
    named = named_parts(batch)
    if named is not None:
        outputs = _of_names(model, named, batch)
    elif isinstance(batch, tuple | list) and len(batch) > 1:
        outputs = model(batch[0])
    else:
        raise unclear(batch)
    logits: Tensor = getattr(outputs, "logits", outputs)
    return logits


def _of_names(model: nn.Module, named: Any, batch: Batch) -> Any:
    inputs = [name for name in INPUTS if name in named]
    if inputs:
        return model(named[inputs[0]])
    others = {name: part for name, part in named.items() if name not in TARGETS}
    if not others or len(others) == len(named):
        raise unclear(batch)
    return model(**others)


def supervised_loss(criterion: object) -> LossOfModel:
    """A ``loss_fn(model, batch)`` from ``criterion(outputs, targets)``, a module or function.

    Its ``weighting`` says what a batch counts in the mean, where the criterion is known here.
    """
    return LossOfModel(supervised_forward, recognised(criterion))


def supervised_loss_of_output(criterion: object) -> LossOfOutput:
    """A ``loss_of_output_fn(outputs, batch)`` from ``criterion(outputs, targets)``."""
    return recognised(criterion)


@dataclass(frozen=True)
class SupervisedPerSampleLoss:
    """``(model, batch) -> (N,)``, the losses of the samples of a batch, each by itself."""

    losses: _PerSample

    @property
    def weighting(self) -> Weighting | None:
        """What a sample counts in the loss of a batch, where the loss is known."""
        return self.losses.weighting

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.losses.per_sample(supervised_forward(model, batch), batch)


def supervised_per_sample_loss(criterion: object) -> SupervisedPerSampleLoss:
    """``(model, batch) -> (N,)``: the criterion applied to every sample by itself.

    One evaluation for the losses of torch that are known here, N for others.
    """
    loss = recognised(criterion)
    return SupervisedPerSampleLoss(loss if isinstance(loss, _PerSample) else AutogradLoss(loss))


def cross_entropy_loss_of_output(**options: Any) -> CrossEntropy:
    """Cross-entropy ``(outputs, batch) -> scalar``; options as for ``CrossEntropy``."""
    return CrossEntropy(**options)


def mse_loss_of_output(**options: Any) -> MeanSquaredError:
    """Mean squared error ``(outputs, batch) -> scalar``; options as for ``MeanSquaredError``."""
    return MeanSquaredError(**options)
