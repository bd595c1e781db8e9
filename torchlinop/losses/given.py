"""Losses as users give them, called with what they take, and left as they were found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchlinop.batches import Batch
from torchlinop.errors import OptionError
from torchlinop.model_state import given_back

Targets = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class OfTargets:
    """``(outputs, batch) ↦ criterion(outputs, targets(batch))``."""

    criterion: Callable[[Tensor, Tensor], Tensor]
    targets: Targets

    def __call__(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self.criterion(outputs, self.targets(batch))


@dataclass(frozen=True)
class OfBatch:
    """``function(outputs, batch)``, with a word for those who gave one of the targets."""

    function: Any

    def __repr__(self) -> str:
        return repr(self.function)

    def __call__(self, outputs: Tensor, batch: Batch) -> Tensor:
        try:
            loss: Tensor = self.function(outputs, batch)
        except (TypeError, AttributeError) as error:  # a batch is no tensor
            raise OptionError(
                f"expected a loss of (outputs, batch), but {self.function!r} failed with these "
                f"({error}); if it takes (outputs, targets), pass supervised_loss_of_output of it"
            ) from error
        return loss

    def hvp(self, outputs: Tensor, batch: Batch, u: Tensor) -> Tensor:
        """The function's own product."""
        product: Tensor = self.function.hvp(outputs, batch, u)
        return product


@dataclass(frozen=True)
class Unchanged:
    """A module that finds its buffers the same at every call, and is given back as it was."""

    module: nn.Module
    buffers: dict[str, Tensor]

    def __repr__(self) -> str:
        return repr(self.module)

    def __call__(self, *arguments: Any) -> Tensor:
        with self._placed():
            loss: Tensor = self.module(*arguments)
        return loss

    def hvp(self, *arguments: Any) -> Tensor:
        """The module's own product."""
        with self._placed():
            product: Tensor = self.module.hvp(*arguments)  # type: ignore[operator]
        return product

    @contextmanager
    def _placed(self) -> Iterator[None]:
        with given_back(self.module):
            for name, buffer in self.buffers.items():
                prefix, _, key = name.rpartition(".")
                self.module.get_submodule(prefix)._buffers[key] = buffer.clone()
            yield


def unchanged(loss: Any) -> Any:
    """The loss; a module so that no call changes it, or depends on an earlier one."""
    if not isinstance(loss, nn.Module) or isinstance(loss, torch.jit.ScriptModule):
        return loss
    buffers = loss.named_buffers(remove_duplicate=False)
    return Unchanged(loss, {name: buffer.detach().clone() for name, buffer in buffers})
