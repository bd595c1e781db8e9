"""L(forward(model, batch), batch): the loss of a model, kept apart from that of its outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from torchlinop.batches import Batch
from torchlinop.errors import LossShapeError
from torchlinop.losses.base import LossOfOutput
from torchlinop.weighting import Weighting

ForwardFn = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class LossOfModel:
    """``(model, batch) -> scalar`` by way of the model's outputs."""

    forward: ForwardFn
    loss: LossOfOutput

    @property
    def weighting(self) -> Weighting | None:
        """What a batch counts, if the loss knows."""
        return self.loss.weighting

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.loss(self.outputs(model, batch), batch)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """What is differentiated; LossShapeError if it is no tensor."""
        return outputs_of(self.forward, model, batch)


def outputs_of(forward: ForwardFn, model: nn.Module, batch: Batch) -> Tensor:
    """What ``forward`` returns, or its logits if it is the output object of a library.

    Raises:
        LossShapeError: it is no tensor of floating-point numbers.
    """
    outputs: object = forward(model, batch)
    outputs = getattr(outputs, "logits", outputs)
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        kind = outputs.dtype if isinstance(outputs, Tensor) else type(outputs).__name__
        raise LossShapeError(
            f"forward_fn returned {kind}, expected one floating-point tensor of outputs; "
            "return the logits alone, as model(**batch).logits"
        )
    return outputs
