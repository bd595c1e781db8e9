"""Which selected parameters K-FAC's layers explain on all data, found by measurement."""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from torch import nn

from torchlinop.batches import Batch
from torchlinop.errors import NonFiniteError
from torchlinop.from_model import OutputObjective
from torchlinop.operators.kfac.coverage import Coverage, Policy
from torchlinop.operators.kfac.examination import NO_SAMPLES, OTHER_ROWS, Reading, examined
from torchlinop.operators.kfac.layers import Layer, ScaleLayer
from torchlinop.operators.kfac.rules import layer_of, why_no_rule
from torchlinop.operators.kfac.tape import numbered
from torchlinop.operators.kfac.uses import Uses, layers_of
from torchlinop.parameters import ParameterLayout

log = logging.getLogger("torchlinop")


@dataclass(frozen=True)
class Survey:
    """What was measured."""

    layers: tuple[Layer, ...]  # with a covered parameter
    uses: Uses  # of covered slots
    missing: Mapping[str, str]  # the reason, by the name of the slot
    unused: tuple[str, ...]  # slots

    def coverage(self, objective: OutputObjective, policy: Policy) -> Coverage:
        """The report."""
        layout, module = objective.layout, objective.model.module
        covered = [slot for slot in layout.slots if slot.name not in self.missing]
        return Coverage(
            sum(slot.numel for slot in covered),
            layout.size,
            len(covered),
            {layer.name: layer.kind for layer in self.layers},
            {
                f"{_owner(module, slot.name)} {slot.name}": ", tied to ".join(
                    [self.missing[slot.name], *slot.names[1:]]
                )
                for slot in layout.slots
                if slot.name in self.missing
            },
            self.unused,
            policy,
        )


def survey(objective: OutputObjective, unused: Sequence[str], gradients: bool) -> Survey:
    """Compare the gradient that the layers explain with autograd's, parameter by parameter.

    So a parameter that is also used outside of its layer is found, as is a layer that computes
    something else than its class says, or whose rows belong to other samples. ``gradients=False``
    leaves out layers that need them. Costs a forward and ``2 + 2 log₂ N`` backward passes of all
    data, and up to twice more forward and backward where an input seems to serve all samples. What
    processes find in their data is put together: a parameter has to be explained by all.

    Raises:
        NonFiniteError: inputs of layers, outputs or gradients are NaN or infinite.
    """
    ranks = objective.ranks
    candidates, missing = _candidates(objective.layout, objective.model.module, gradients)
    never_used = set.intersection(*map(set, ranks.gathered(unused)))
    for name in never_used:
        missing.pop(name, None)
        candidates.pop(name, None)
    with ranks.agreed():
        uses, seen = _survey_here(objective, candidates, missing)
    of_ranks = ranks.gathered(seen)
    missing = dict(ChainMap(*(dict(theirs.missing) for theirs in of_ranks)))
    unseen = set.intersection(*(set(theirs.unseen) for theirs in of_ranks))
    uses = _with_shared(uses, {name for theirs in of_ranks for name in theirs.shared})
    explained = {n: of_slot for n, of_slot in uses.items() if n not in {*missing, *unseen}}
    return Survey(layers_of(explained), explained, missing, tuple(sorted({*unseen, *never_used})))


@dataclass(frozen=True)
class _Seen:
    """What the data of a process tell, by names of slots and layers."""

    missing: Mapping[str, str]
    unseen: set[str]  # without influence
    shared: set[str]  # layers


def _survey_here(
    objective: OutputObjective, uses: Uses, missing: Mapping[str, str]
) -> tuple[Uses, _Seen]:
    uses, missing = dict(uses), dict(missing)
    unseen = set(uses) | set(missing)
    with closing(numbered(objective)) as batches:  # type: ignore[type-var]  # a generator
        for b, batch, _ in batches:
            possible = {name: found for name, found in uses.items() if name not in missing}
            result = _of_batch(objective, b, batch, possible)
            unseen -= result.found.keys()
            uses.update(result.uses)
            missing.update({name: reason for name, reason in result.found.items() if reason})
    seen = {name: reason for name, reason in missing.items() if name not in unseen}
    shared = {layer.name for layer in layers_of(uses) if layer.shared}
    return uses, _Seen(seen, unseen, shared)


def _candidates(
    layout: ParameterLayout, module: nn.Module, gradients: bool
) -> tuple[dict[str, Sequence[tuple[Layer, str]]], dict[str, str]]:
    """The layers that hold the parameter of every slot, and slots that others hold."""
    slot_of = {name: slot.name for slot in layout.slots for name in slot.names}
    uses: dict[str, list[tuple[Layer, str]]] = {}
    missing: dict[str, str] = {}
    for prefix, owner in module.named_modules():
        layer = layer_of(prefix, owner)
        for key in owner._parameters:
            slot = slot_of.get(f"{prefix}.{key}" if prefix else key)
            if slot is None:
                continue
            if layer is None or key not in ("weight", "bias"):
                missing[slot] = why_no_rule(owner, key)
            elif isinstance(layer, ScaleLayer) and not gradients:
                missing[slot] = "its block needs gradients, which forward-only has not"
            else:
                uses.setdefault(slot, []).append((layer, key))
    for slot, of_slot in uses.items():
        if len({isinstance(layer, ScaleLayer) for layer, _ in of_slot}) > 1:
            missing[slot] = "shared by layers of different kinds"
    return {s: u for s, u in uses.items() if s not in missing}, missing


def _of_batch(objective: OutputObjective, b: int, batch: Batch, uses: Uses) -> Reading:
    """The better of two readings, where an input that does not begin with samples may be shared.

    Tried out: with an input for every sample the outputs must be the same.
    """
    plain = examined(objective, b, batch, _with_shared(uses, set()))
    shared = {layer.name for layer in layers_of(uses) if layer.shared}  # in earlier batches
    suspects = shared | {
        layer.name
        for name, reason in plain.found.items()
        if reason in (NO_SAMPLES, OTHER_ROWS)
        for layer, _ in uses[name]
    }
    spread = _tried(objective, b, batch, _with_shared(uses, suspects), plain)
    if spread is not None:
        return spread
    held = {name for name, of_slot in uses.items() if any(la.name in shared for la, _ in of_slot)}
    return replace(plain, found={**plain.found, **dict.fromkeys(held, NO_SAMPLES)})


def _with_shared(uses: Uses, names: Collection[str]) -> Uses:
    """The same with the layers of these names shared, and no others."""
    return {
        name: [(replace(layer, shared=layer.name in names), key) for layer, key in of_slot]
        for name, of_slot in uses.items()
    }


def _tried(
    objective: OutputObjective, b: int, batch: Batch, uses: Uses, plain: Reading
) -> Reading | None:
    """What shared inputs tell, unless they change the outputs; None without such layers."""
    if not any(layer.shared for layer in layers_of(uses)):
        return None
    try:
        result = examined(objective, b, batch, uses)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, LookupError, TypeError, ValueError, NonFiniteError) as error:
        log.info("the model does not take an input for every sample: %s", error)
        return None
    half = torch.finfo(plain.outputs.dtype).eps ** 0.5
    same = result.outputs.shape == plain.outputs.shape and torch.allclose(
        result.outputs, plain.outputs, rtol=half, atol=half * float(plain.outputs.abs().max())
    )
    return result if same else None


def _owner(module: nn.Module, name: str) -> str:
    return type(module.get_submodule(name.rpartition(".")[0])).__name__
