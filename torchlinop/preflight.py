"""What one gradient of the first batch reveals before any product is taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchlinop.batches import Batch, detached_copy, shell, tensors
from torchlinop.checkpointing import noticed_packing, noticed_reentrance
from torchlinop.diagnosis import changed_parameters, refuse_reentrance, refuse_silent_gaps
from torchlinop.errors import LossShapeError, UnusedParameterWarning, warn_caller
from torchlinop.graphs import saved_bytes
from torchlinop.objective import Objective, scalar


@dataclass(frozen=True)
class Preflight:
    """Facts about the objective's graph."""

    graph_bytes: int  # held by the kept graphs of all batches, if all are like the first
    batch_bytes: int  # of these, for the first batch: about what one more column needs in a pass
    packs_tensors: bool  # whether saved tensors are packed away, as by activation checkpointing
    unused: tuple[str, ...]  # selected parameters that do not influence the loss
    dtype: torch.dtype  # of the loss, or the outputs
    writes: bool  # whether the model or the loss writes into its batch

    def notes(self, objective: Objective) -> list[str]:
        """Facts for people, a line each: parameters, modules."""
        layout = objective.layout
        named = [
            ("frozen", layout.frozen),
            ("filtered out", layout.filtered),
            ("tied", [f"{alias} = {name}" for alias, name in layout.aliases.items()]),
            ("without influence", self.unused),
        ]
        return [
            "; ".join(
                [f"parameters: {len(layout.slots)} selected"]
                + [f"{len(names)} {what} ({_few(names)})" for what, names in named if names]
            ),
            f"modules: {objective.model.describe()}",
        ]

    @property
    def memory_note(self) -> str:
        """Likewise of the graphs, for matrices that may keep them."""
        return f"memory: about {self.graph_bytes:,} bytes for the graphs of all batches, if kept"


def _few(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def preflight(
    objective: Objective,
    second_order: bool,
    of: Callable[[nn.Module, Batch], Tensor] | None = None,
) -> Preflight:
    """Take the gradient of the first batch; with ``second_order``, as for a Hessian product.

    ``of(model, batch)`` takes the place of the loss: the outputs whose Jacobian is wanted.

    Costs one gradient; one per further batch only while some parameter is found unused. With
    ``of``, a forward pass more, for the loss of the outputs.

    Raises:
        LossShapeError: the loss is no scalar, or has no graph.
        ParameterError: the loss uses parameters that are not those of the model it is given.
        DoubleBackwardError: the graph has a gap that autograd would pass over silently.
    """
    facts: list[_Facts] = []
    unused: set[str] = set(objective.layout.names)

    def examine(b: int, batch: Batch) -> Tensor:
        nonlocal unused
        if unused:
            facts.append(_gradient_facts(objective, b, batch, second_order, of))
            unused &= facts[-1].without
        return torch.zeros(())

    objective.mean_here(examine)
    if len(unused) == len(objective.layout.slots):
        what = "loss" if of is None else "output of the model"
        raise LossShapeError(
            f"the {what} does not require grad: was it computed under no_grad, or detached, "
            "or do the selected parameters not enter it? Return it with its graph"
        )
    if unused:
        _warn_unused(objective, unused)
    saved = max(fact.saved for fact in facts)
    return Preflight(
        saved * objective.data.own.batches,
        saved,
        any(fact.packed for fact in facts),
        tuple(sorted(unused)),
        facts[0].dtype,
        any(fact.writes for fact in facts),
    )


@dataclass(frozen=True)
class _Facts:
    """Of one batch."""

    saved: int  # bytes
    packed: bool
    without: set[str]  # parameters without influence
    dtype: torch.dtype
    writes: bool


def _gradient_facts(
    objective: Objective,
    b: int,
    batch: Batch,
    second_order: bool,
    of: Callable[[nn.Module, Batch], Tensor] | None,
) -> _Facts:
    module, layout = objective.model.module, objective.layout
    own: dict[Tensor, str] = {p: name for name, p in module.named_parameters() if p.requires_grad}
    split = layout.split(objective.theta)
    leaves = {slot.name: split[slot.name].detach().requires_grad_() for slot in layout.slots}
    named = {name: leaves[slot.name] for slot in layout.slots for name in slot.names}
    point = objective.theta.clone()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return scalar(objective.function(model, batch))

    with objective.evaluating(b, batch):
        copies = [detached_copy(batch) for _ in range(1 if of is None else 2)]
        with noticed_packing() as packing, noticed_reentrance() as reentrant:
            values = (of or loss)(objective.model.place(named), shell(copies[0]))
            if of is not None:
                with torch.no_grad():  # whether the loss takes these outputs
                    loss(objective.model.place(named), shell(copies[1]))
        if reentrant:
            refuse_reentrance()
        if not torch.equal(torch.nan_to_num(point), torch.nan_to_num(objective.theta)):
            raise changed_parameters()
        if not values.requires_grad:
            return _Facts(0, bool(packing), set(leaves), values.dtype, writes=True)
        refuse_silent_gaps(values, own, twice=second_order)
        gradients = torch.autograd.grad(
            values,
            list(leaves.values()),
            values.new_ones(()).expand(values.shape).requires_grad_(second_order),
            allow_unused=True,
            create_graph=second_order,
        )
    # Reading what is packed would unpack it: by computing it again, for a checkpoint.
    besides = [*leaves.values(), *tensors(copies), *own]
    saved = 0 if packing else saved_bytes([g for g in gradients if g is not None], besides)
    without = {name for name, g in zip(leaves, gradients, strict=True) if g is None}
    writes = any(tensor._version for tensor in tensors(copies))  # 0 until they are written to
    return _Facts(saved, bool(packing), without, values.dtype, writes)


def _warn_unused(objective: Objective, unused: set[str]) -> None:
    layout = objective.layout
    entries = sum(slot.numel for slot in layout.slots if slot.name in unused)
    warn_caller(
        f"{len(unused)} of {len(layout.slots)} tensors ({entries:,} of {layout.size:,} entries) do "
        f"not influence the loss: {_few(sorted(unused), 5)}. Their rows are zero; leave them out "
        "with param_filter.",
        UnusedParameterWarning,
    )
