"""What one gradient of the first batch reveals before any product is taken."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchlinop.batches import tensors
from torchlinop.diagnosis import refuse_silent_gaps
from torchlinop.errors import LossShapeError, UnusedParameterWarning
from torchlinop.memory import SavedBytes
from torchlinop.objective import Objective


@dataclass(frozen=True)
class Preflight:
    """Facts about the objective's graph."""

    graph_bytes: int  # held by the kept graphs of all batches, if all are like the first
    batch_bytes: int  # of these, for the first batch: about what one more column needs in a pass
    recomputes: bool  # whether a backward pass runs modules again (activation checkpointing)
    unused: tuple[str, ...]  # selected parameters that do not influence the loss


def preflight(objective: Objective, second_order: bool) -> Preflight:
    """Take the gradient of the first batch; with ``second_order``, as for a Hessian product.

    Costs one gradient; one per further batch only while some parameter is found unused.

    Raises:
        LossShapeError: the loss is no scalar, or has no graph.
        DoubleBackwardError: the graph has a gap that autograd would pass over silently.
    """
    facts: list[tuple[int, bool]] = []
    unused: set[str] = set(objective.layout.names)

    def examine(b: int, batch: object) -> Tensor:
        nonlocal unused
        if unused:
            found = _gradient_facts(objective, b, batch, second_order and b == 0)
            facts.append(found[:2])
            unused &= set(found[2])
        return torch.zeros(())

    objective.mean(examine)
    if unused:
        _warn_unused(objective, unused)
    saved, recomputes = facts[0]
    return Preflight(saved * objective.data.batches, saved, recomputes, tuple(sorted(unused)))


def _gradient_facts(
    objective: Objective, b: int, batch: object, second_order: bool
) -> tuple[int, bool, list[str]]:
    split = objective.layout.split(objective.theta)
    leaves = {
        slot.name: split[slot.name].detach().requires_grad_() for slot in objective.layout.slots
    }
    named = {name: leaves[slot.name] for slot in objective.layout.slots for name in slot.names}
    besides = [*leaves.values(), *tensors(batch), *objective.model.module.parameters()]
    with objective.evaluating(b, batch), SavedBytes(besides) as saved:
        loss = objective.value(named, batch)
        if not loss.requires_grad:
            raise LossShapeError(
                "the loss does not require grad: was it computed under no_grad, or detached, "
                "or do the selected parameters not enter it? Return a loss with its graph"
            )
        refuse_silent_gaps(loss, twice=second_order)
        with _Recomputation(objective.model.module) as recomputation:
            gradients = torch.autograd.grad(
                loss, list(leaves.values()), allow_unused=True, create_graph=second_order
            )
    unused = [name for name, g in zip(leaves, gradients, strict=True) if g is None]
    return saved.total, recomputation.seen, unused


class _Recomputation:
    """Notices modules that run forward inside the ``with``."""

    def __init__(self, model: nn.Module) -> None:
        self.seen = False
        self._modules = list(model.modules())

    def __enter__(self) -> _Recomputation:
        self._handles = [m.register_forward_pre_hook(self._notice) for m in self._modules]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _notice(self, module: nn.Module, inputs: object) -> None:
        self.seen = True


def _warn_unused(objective: Objective, unused: set[str]) -> None:
    layout = objective.layout
    entries = sum(slot.numel for slot in layout.slots if slot.name in unused)
    names = sorted(unused)
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    warnings.warn(
        f"{len(names)} of {len(layout.slots)} tensors ({entries:,} of {layout.size:,} entries) do "
        f"not influence the loss: {shown}. Their rows are zero; leave them out with param_filter.",
        UnusedParameterWarning,
        stacklevel=4,
    )
