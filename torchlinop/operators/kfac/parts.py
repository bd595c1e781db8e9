"""The selected parameters, shared out among blocks: K-FAC's, exact ones, and what is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from torchlinop.from_model import OutputObjective
from torchlinop.operators.kfac.coverage import Policy
from torchlinop.operators.kfac.factors import (
    Constant,
    DensePart,
    DiagonalPart,
    GradientMoment,
    KroneckerPart,
    Part,
)
from torchlinop.operators.kfac.layers import KroneckerLayer, Layer, ScaleLayer
from torchlinop.operators.kfac.survey import Survey
from torchlinop.operators.kfac.uses import KroneckerUse, Uses, joint_use, use_of
from torchlinop.operators.kronecker import diagonal_block
from torchlinop.parameters import ParameterLayout, Slot


@dataclass(frozen=True)
class Plan:
    """What the blocks are to be."""

    separate: bool  # weights and biases
    reduced: bool
    with_gradients: bool


@dataclass(frozen=True)
class Parts:
    """Parts that together hold all entries of the flat vector, and what some of them share."""

    parts: Sequence[Part]
    moments: Sequence[GradientMoment]


def parts_of(objective: OutputObjective, found: Survey, policy: Policy, plan: Plan) -> Parts:
    """A part for every group of parameters."""
    layout, like = objective.layout, objective.theta
    moments = {
        layer.name: GradientMoment(layer, plan.reduced, plan.with_gradients)
        for layer in found.layers
        if isinstance(layer, KroneckerLayer)
    }
    parts: list[Part] = []
    for slots in _groups(layout, found.uses, plan.separate):
        uses = [found.uses[slot.name] for slot in slots]
        if isinstance(uses[0][0][0], ScaleLayer):
            of_slots = [[use_of(*use) for use in of_slot] for of_slot in uses]
            sizes = [slot.numel for slot in slots]
            parts.append(DensePart(_indices(slots, like), of_slots, sizes))
        else:
            entries, shape, of_matrix = _matrix(slots, uses[0], like)
            parts.append(KroneckerPart(entries, shape, of_matrix, plan.reduced, moments))
    rest = [slot for slot in layout.slots if slot.numel and slot.name not in found.uses]
    missing = [slot for slot in rest if slot.name in found.missing]
    if missing and policy == "diag":
        parts.append(DiagonalPart(_indices(missing, like)))
        rest = [slot for slot in rest if slot not in missing]
    ones = missing if policy == "identity" else []
    parts += [_constant(slot, float(slot in ones), like) for slot in rest]
    return Parts(parts, list(moments.values()))


def _groups(layout: ParameterLayout, uses: Uses, separate: bool) -> list[list[Slot]]:
    """Slots that make one block: weight and bias of a normalisation, and of others if so asked.

    A tied parameter makes a block of its own.
    """
    groups: dict[str, list[Slot]] = {}
    for slot in layout.slots:
        of_slot = uses.get(slot.name, ())
        if slot.numel and of_slot:
            layer = of_slot[0][0]
            alone = len(of_slot) > 1 or (separate and not isinstance(layer, ScaleLayer))
            groups.setdefault(slot.name if alone else f"module {layer.name}", []).append(slot)
    return list(groups.values())


def _matrix(
    slots: Sequence[Slot], uses: Sequence[tuple[Layer, str]], like: Tensor
) -> tuple[slice | Tensor, tuple[int, int], list[KroneckerUse]]:
    """Where a matrix (r, c) of parameters is in the vector, and where it acts."""
    layer, slot = cast(KroneckerLayer, uses[0][0]), slots[0]
    if len(slots) == 2:
        indices = _joint_matrix(layer, slots, like)
        return indices.flatten(), (indices.shape[0], indices.shape[1]), [joint_use(layer)]
    of_slot = [use for use in (use_of(*u) for u in uses) if isinstance(use, KroneckerUse)]
    shape = (slot.shape[0], slot.numel // slot.shape[0])
    return slice(slot.offset, slot.stop), shape, of_slot


def _joint_matrix(layer: KroneckerLayer, slots: Sequence[Slot], like: Tensor) -> Tensor:
    """Where ``[W, b]`` (d_out, d_in + 1), or ``[W; b]`` (d_in + 1, d_out), is in the vector."""
    weight, bias = sorted(slots, key=lambda slot: len(slot.shape), reverse=True)
    W = _indices([weight], like).view(weight.shape[0], -1)
    b = _indices([bias], like)
    return torch.cat([W, b[None]]) if layer.inputs_first else torch.cat([W, b[:, None]], 1)


def _constant(slot: Slot, value: float, like: Tensor) -> Constant:
    """``value`` times the identity."""
    return Constant(
        diagonal_block(slice(slot.offset, slot.stop), like.new_full((slot.numel,), value))
    )


def _indices(slots: Sequence[Slot], like: Tensor) -> Tensor:
    return torch.cat([torch.arange(s.offset, s.stop, device=like.device) for s in slots])
