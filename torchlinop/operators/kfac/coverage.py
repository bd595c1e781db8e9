"""Which selected parameters K-FAC has factors for, found by measurement, and why not the others."""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from torchlinop.batches import Batch
from torchlinop.errors import KFACCoverageError, NonFiniteError, ParameterError
from torchlinop.from_model import OutputObjective
from torchlinop.operators.kfac.layers import Layer, ScaleLayer, layer_of, why_no_rule
from torchlinop.operators.kfac.tape import Call, Tape, numbered, recorded
from torchlinop.operators.kfac.uses import summed_over_uses, use_of
from torchlinop.parameters import ParameterLayout, Slot

log = logging.getLogger("torchlinop")

_NO_SAMPLES = "the input of its layer does not begin with the samples"
_OTHER_ROWS = "the rows of its layer are not those of the samples in their order"
_OTHERWISE = "its layer computes something else than its class says"
_ELSEWHERE = f"also used outside of its layer, or {_OTHERWISE}"

Uses = Mapping[str, Sequence[tuple[Layer, str]]]  # of a slot: layers, and "weight" or "bias"

Policy = Literal["error", "diag", "identity", "skip"]


@dataclass(frozen=True, repr=False)
class Coverage:
    """What of the selected parameters has a K-FAC block, and what became of the rest."""

    entries: int  # covered
    size: int  # n
    tensors: int  # covered
    layers: Mapping[str, str]  # the kind of layer by the name of the module
    missing: Mapping[str, str]  # the reason, by class and name of the parameter
    unused: Sequence[str]  # covered, as their rows are zero: they do not influence the outputs
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
        lines += [f"  zero rows: {name} (without influence)" for name in self.unused]
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


def refuse_unfit_modules(model: nn.Module) -> None:
    """Refuse sparse gradients, and weights that are no real numbers.

    Raises:
        ParameterError: there is such a module.
    """
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) and isinstance(module, nn.Embedding | nn.EmbeddingBag):
            raise ParameterError(
                f"{type(module).__name__} {name or '(the model itself)'} has sparse gradients; "
                "build it with sparse=False"
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
    return Survey(_distinct(explained), explained, missing, tuple(sorted({*unseen, *never_used})))


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
    shared = {layer.name for layer in _distinct(uses) if layer.shared}
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


@dataclass(frozen=True)
class _Result:
    """What a batch tells."""

    uses: Uses
    found: Mapping[str, str | None]  # of slots with influence: why not explained, or None
    outputs: Tensor


def _of_batch(objective: OutputObjective, b: int, batch: Batch, uses: Uses) -> _Result:
    """The better of two readings, where an input that does not begin with samples may be shared.

    Tried out: with an input for every sample the outputs must be the same.
    """
    plain = _examined(objective, b, batch, _with_shared(uses, set()))
    shared = {layer.name for layer in _distinct(uses) if layer.shared}  # in earlier batches
    suspects = shared | {
        layer.name
        for name, reason in plain.found.items()
        if reason in (_NO_SAMPLES, _OTHER_ROWS)
        for layer, _ in uses[name]
    }
    spread = _tried(objective, b, batch, _with_shared(uses, suspects), plain)
    if spread is not None:
        return spread
    held = {name for name, of_slot in uses.items() if any(la.name in shared for la, _ in of_slot)}
    return replace(plain, found={**plain.found, **dict.fromkeys(held, _NO_SAMPLES)})


def _with_shared(uses: Uses, names: Collection[str]) -> Uses:
    """The same with the layers of these names shared, and no others."""
    return {
        name: [(replace(layer, shared=layer.name in names), key) for layer, key in of_slot]
        for name, of_slot in uses.items()
    }


def _tried(
    objective: OutputObjective, b: int, batch: Batch, uses: Uses, plain: _Result
) -> _Result | None:
    """What shared inputs tell, unless they change the outputs; None without such layers."""
    if not any(layer.shared for layer in _distinct(uses)):
        return None
    try:
        result = _examined(objective, b, batch, uses)
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


def _examined(objective: OutputObjective, b: int, batch: Batch, uses: Uses) -> _Result:
    with recorded(objective, b, batch, _distinct(uses)) as tape:
        if not tape.is_finite:
            raise NonFiniteError(_not_finite("what goes through the model", b))
        return _Result(uses, _examine(tape, b, objective.layout, uses), tape.outputs.detach())


def _examine(tape: Tape, b: int, layout: ParameterLayout, uses: Uses) -> dict[str, str | None]:
    """For every slot with influence on the outputs: why it is not explained, or None.

    One random vector is backpropagated.
    """
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(tape.outputs.shape, generator=generator).to(tape.outputs)
    exact = tape.parameter_gradient(v)
    if not torch.isfinite(exact).all():
        raise NonFiniteError(_not_finite("the gradient of the model's outputs", b))
    unfit = {name: _unfit(tape, calls) for name, calls in tape.calls.items()}
    fit = tape.without([name for name, reason in unfit.items() if reason])
    for name in _mixing(fit, v):
        unfit[name] = _OTHER_ROWS
    gradients = fit.gradients(v[None])
    found: dict[str, str | None] = {}
    for slot in layout.slots:
        G, of_slot = exact[slot.offset : slot.stop], uses.get(slot.name, ())
        names = {layer.name for layer, _ in of_slot}
        reasons = [unfit[name] for name in names & unfit.keys() if unfit[name]]
        if reasons:
            found[slot.name] = reasons[0]
        elif names & gradients.keys():
            found[slot.name] = _reason(tape, gradients, of_slot, slot, G)
        elif G.any():
            found[slot.name] = "used without calling its layer" if of_slot else None
    return found


def _unfit(tape: Tape, calls: Sequence[Call]) -> str | None:
    """Why the shapes of the calls of a layer are none it knows, or None."""
    if not all(call.layer.begins_with_samples(call.x, tape.samples) for call in calls):
        return _NO_SAMPLES
    try:
        fits = [call.layer.fits(call.x.to("meta"), call.output, tape.samples) for call in calls]
    except (RuntimeError, LookupError, ValueError) as error:
        log.info("a layer is not what its class says: %s", error)
        return _OTHERWISE
    return None if all(fits) else _OTHERWISE


def _mixing(tape: Tape, v: Tensor) -> set[str]:
    """The layers at which outputs of a sample have gradients in the rows of others.

    Two samples differ in a bit of their numbers: the vector is cut to the samples whose bit is 0,
    then to those whose bit is 1, for every bit.
    """
    number = torch.arange(tape.samples, device=v.device)
    bits = range((tape.samples - 1).bit_length())
    halves = [(number >> bit) % 2 == value for bit in bits for value in (0, 1)]
    mixing: set[str] = set()
    for own in torch.stack(halves).split(tape.vectors_at_once()) if halves else ():
        rows = own.repeat_interleave(len(v) // tape.samples, 1)
        gradients = tape.gradients(v * rows.view(*rows.shape, *[1] * (v.ndim - 1)))
        for name, g in gradients.items():
            foreign = g[~own]  # (rows, S, d_out)
            if foreign.numel() and foreign.abs().max() > torch.finfo(g.dtype).eps * g.abs().max():
                mixing.add(name)
    return mixing


def _reason(
    tape: Tape,
    gradients: Mapping[str, Tensor],
    uses: Sequence[tuple[Layer, str]],
    slot: Slot,
    exact: Tensor,
) -> str | None:
    """Why layers that were called do not explain the gradient, or None if they do."""
    half = torch.finfo(slot.dtype).eps ** 0.5  # half of the digits
    of_slot = [use_of(layer, key) for layer, key in uses if layer.name in gradients]
    try:
        parts = summed_over_uses(tape, gradients, of_slot, slot.numel)
        explained = torch.stack([G.sum((0, 1)).flatten() for G in parts]).sum(0)
        # Gradients may cancel exactly, as that of a bias before a softmax: measured by bounds.
        size = exact.norm() + torch.stack([u.bound(tape, gradients) for u in of_slot]).sum()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, LookupError, TypeError, ValueError) as error:
        log.info("%s is not explained: %s", slot.name, error)
        return _OTHERWISE
    if explained.shape != exact.shape:
        return _OTHERWISE
    return None if (explained - exact).norm() <= half * size else _ELSEWHERE


def _not_finite(what: str, b: int) -> str:
    return f"{what} on batch {b} holds NaN or infinity; clean the data, or the parameters"


def _distinct(uses: Uses) -> tuple[Layer, ...]:
    return tuple({layer.name: layer for u in uses.values() for layer, _ in u}.values())


def _owner(module: nn.Module, name: str) -> str:
    return type(module.get_submodule(name.rpartition(".")[0])).__name__
