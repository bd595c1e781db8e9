"""Which selected parameters K-FAC has factors for, found by measurement, and why not the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from torchlinop.batches import Batch
from torchlinop.errors import KFACCoverageError, ParameterError
from torchlinop.from_model import OutputObjective
from torchlinop.operators.kfac.layers import Layer, ScaleLayer, layer_of
from torchlinop.operators.kfac.tape import Tape, numbered, recorded
from torchlinop.operators.kfac.uses import summed_over_uses, use_of
from torchlinop.parameters import ParameterLayout, Slot

_NO_SAMPLES = "the input of its layer does not begin with the samples"
_OTHER_AXIS = "its layer has the samples on another axis than the first"

_Uses = Mapping[str, Sequence[tuple[Layer, str]]]  # of a slot: layers, and "weight" or "bias"

Policy = Literal["error", "diag", "identity", "skip"]


@dataclass(frozen=True, repr=False)
class Coverage:
    """What of the selected parameters has a K-FAC block, and what became of the rest."""

    entries: int  # covered
    size: int  # n
    tensors: int  # covered
    layers: Mapping[str, str]  # the kind of layer by the name of the module
    missing: Mapping[str, str]  # the reason, by class and name of the parameter
    policy: Policy  # for these

    @property
    def percent(self) -> int:
        """Rounded down, so that 100 means all."""
        return 100 * self.entries // self.size

    @property
    def summary(self) -> str:
        """A line."""
        return f"K-FAC covers {self.percent} % of the {self.size:,} entries"

    def __repr__(self) -> str:
        lines = [f"{self.summary}, in {self.tensors} tensors"]
        lines += [f"  {name or 'the model itself'}: {kind}" for name, kind in self.layers.items()]
        policy = f', unsupported="{self.policy}"'
        lines += [f"  not covered: {name} ({why}){policy}" for name, why in self.missing.items()]
        return "\n".join(lines)

    def enforce(self) -> None:
        """Raise KFACCoverageError if something is not covered and nothing was said about it."""
        if self.missing and self.policy == "error":
            listed = [f"{name} ({why})" for name, why in self.missing.items()]
            shown = ", ".join(listed[:5]) + (", ..." if len(listed) > 5 else "")
            raise KFACCoverageError(
                f"{self.summary}; not covered: {shown}. "
                'Choose unsupported="diag", "identity" or "skip".'
            )


@dataclass(frozen=True)
class Survey:
    """What was measured."""

    layers: tuple[Layer, ...]  # with a covered parameter
    uses: _Uses  # of covered slots
    missing: Mapping[str, str]  # the reason, by the name of the slot

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
            policy,
        )


def refuse_unfit_modules(model: nn.Module) -> None:
    """Refuse sparse gradients, and weights that are no real numbers.

    Raises:
        ParameterError: there is such a module.
    """
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) and isinstance(module, nn.Embedding | nn.EmbeddingBag):
            raise ParameterError(
                f"{type(module).__name__} {name} has sparse gradients; build it with sparse=False"
            )
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ParameterError(
                f"parameter {name!r} has dtype {parameter.dtype}: K-FAC needs floating-point "
                "weights; load the model without quantisation"
            )


def survey(objective: OutputObjective, unused: Sequence[str], gradients: bool) -> Survey:
    """Compare the gradient that the layers explain with autograd's, parameter by parameter.

    So a parameter that is also used outside of its layer is found, as is a layer that computes
    something else than its class says. ``gradients=False`` leaves out layers that need them.
    Costs one forward and three backward passes of the first batch; of further batches only
    while a parameter has no influence on the outputs so far, or while batches hold one sample;
    and the same again where an input seems to serve all samples.
    """
    layout, module = objective.layout, objective.model.module
    uses, missing = _candidates(layout, module, gradients)
    for name in unused:
        missing.pop(name, None)
        uses.pop(name, None)
    unseen, alone = set(uses) | set(missing), True
    with closing(numbered(objective)) as batches:  # type: ignore[type-var]  # a generator
        for b, batch, _ in batches:
            if not (unseen or alone):
                break
            possible = {name: found for name, found in uses.items() if name not in missing}
            result = _examined(objective, b, batch, possible)
            result = _with_shared_inputs(objective, b, batch, possible, result)
            alone = alone and result.samples == 1
            unseen -= result.found.keys()
            uses.update(result.uses)
            missing.update({name: reason for name, reason in result.found.items() if reason})
    # What is unseen has rows of zeros, like what is unused.
    explained = {n: of_slot for n, of_slot in uses.items() if n not in {*missing, *unseen}}
    return Survey(_distinct(explained), explained, missing)


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
                missing[slot] = f"no K-FAC rule for {type(owner).__name__}"
            elif isinstance(layer, ScaleLayer) and not gradients:
                missing[slot] = "its block needs gradients, which forward-only has not"
            else:
                uses.setdefault(slot, []).append((layer, key))
    for slot, of_slot in uses.items():
        if len({isinstance(layer, ScaleLayer) for layer, _ in of_slot}) > 1:
            missing[slot] = "shared by layers of different kinds"
    return {s: u for s, u in uses.items() if s not in missing}, missing


@dataclass(frozen=True)
class _Result:
    """What a batch tells."""

    uses: _Uses
    found: Mapping[str, str | None]  # of slots with influence: why not explained, or None
    outputs: Tensor
    samples: int


def _examined(objective: OutputObjective, b: int, batch: Batch, uses: _Uses) -> _Result:
    with recorded(objective, b, batch, _distinct(uses)) as tape:
        found = _examine(tape, objective.layout, uses)
        return _Result(uses, found, tape.outputs.detach(), tape.samples)


def _with_shared_inputs(
    objective: OutputObjective, b: int, batch: Batch, uses: _Uses, plain: _Result
) -> _Result:
    """The better of two readings, where an input that does not begin with samples may be shared.

    Tried out: with an input for every sample the outputs must be the same.
    """
    suspects = {
        layer.name
        for name, reason in plain.found.items()
        if reason in (_NO_SAMPLES, _OTHER_AXIS)
        for layer, _ in uses[name]
    }
    if not suspects:
        return plain
    shared = {
        name: [(replace(la, shared=la.shared or la.name in suspects), key) for la, key in of_slot]
        for name, of_slot in uses.items()
    }
    try:
        result = _examined(objective, b, batch, shared)
    except (RuntimeError, IndexError, ValueError):  # the model cannot do with such inputs
        return plain
    half = torch.finfo(plain.outputs.dtype).eps ** 0.5
    same = result.outputs.shape == plain.outputs.shape and torch.allclose(
        result.outputs, plain.outputs, rtol=half, atol=half * float(plain.outputs.abs().max())
    )
    return result if same else plain


def _examine(tape: Tape, layout: ParameterLayout, uses: _Uses) -> dict[str, str | None]:
    """For every slot with influence on the outputs: why it is not explained, or None.

    One random vector is backpropagated, and the same for the outputs of the first sample alone:
    of all gradients at layer outputs only that sample's may then differ from zero.
    """
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(tape.outputs.shape, generator=generator).to(tape.outputs)
    exact = tape.parameter_gradient(v)
    unfit = {
        name
        for name, calls in tape.calls.items()
        if not all(c.layer.begins_with_samples(c.x, tape.samples) for c in calls)
    }
    of_first = torch.arange(len(v), device=v.device) < len(v) // tape.samples
    of_first = of_first.view(-1, *[1] * (v.ndim - 1))
    gradients = tape.without(unfit).gradients(torch.stack([v, v * of_first]))
    found: dict[str, str | None] = {}
    for slot in layout.slots:
        G, of_slot = exact[slot.offset : slot.stop], uses.get(slot.name, ())
        names = {layer.name for layer, _ in of_slot}
        if names & unfit:
            found[slot.name] = _NO_SAMPLES
        elif names & gradients.keys():
            found[slot.name] = _reason(tape, gradients, of_slot, slot, G)
        elif G.any():
            found[slot.name] = "used without calling its layer" if of_slot else None
    return found


def _reason(
    tape: Tape,
    gradients: Mapping[str, Tensor],
    uses: Sequence[tuple[Layer, str]],
    slot: Slot,
    exact: Tensor,
) -> str | None:
    """Why layers that were called do not explain the gradient, or None if they do."""
    half = torch.finfo(slot.dtype).eps ** 0.5  # half of the digits
    called = [(layer, key) for layer, key in uses if layer.name in gradients]
    for layer, _ in called:
        g = gradients[layer.name][1]
        if len(g) > 1 and g[1:].abs().max() > half * g.abs().max():
            return _OTHER_AXIS
    everything = {name: g[:1] for name, g in gradients.items()}
    of_slot = [use_of(layer, key) for layer, key in called]
    parts = summed_over_uses(tape, everything, of_slot, slot.numel)
    explained = torch.stack([G.sum((0, 1)).flatten() for G in parts]).sum(0)
    # Gradients may cancel exactly, as that of a bias before a softmax: measured against bounds.
    size = exact.norm() + torch.stack([u.bound(tape, everything) for u in of_slot]).sum()
    return None if (explained - exact).norm() <= half * size else "also used outside of its layer"


def _distinct(uses: _Uses) -> tuple[Layer, ...]:
    return tuple({layer.name: layer for u in uses.values() for layer, _ in u}.values())


def _owner(module: nn.Module, name: str) -> str:
    return type(module.get_submodule(name.rpartition(".")[0])).__name__
