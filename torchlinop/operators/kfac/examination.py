"""Why layers do not explain the gradients of a batch, parameter by parameter, if they do not."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlinop.batches import Batch
from torchlinop.errors import NonFiniteError
from torchlinop.from_model import OutputObjective
from torchlinop.operators.kfac.layers import Layer
from torchlinop.operators.kfac.tape import Call, Tape, recorded
from torchlinop.operators.kfac.uses import Uses, layers_of, summed_over_uses, use_of
from torchlinop.parameters import ParameterLayout, Slot

log = logging.getLogger("torchlinop")

NO_SAMPLES = "the input of its layer does not begin with the samples"
OTHER_ROWS = "the rows of its layer are not those of the samples in their order"
_OTHERWISE = "its layer computes something else than its class says"
_ELSEWHERE = f"also used outside of its layer, or {_OTHERWISE}"


@dataclass(frozen=True)
class Reading:
    """What a batch tells."""

    uses: Uses
    found: Mapping[str, str | None]  # of slots with influence: why not explained, or None
    outputs: Tensor


def examined(objective: OutputObjective, b: int, batch: Batch, uses: Uses) -> Reading:
    """What the batch tells of the slots: a forward pass and ``2 + 2 log₂ N`` backward passes.

    Raises:
        NonFiniteError: inputs of layers, outputs or gradients are NaN or infinite.
    """
    with recorded(objective, b, batch, layers_of(uses)) as tape:
        if not tape.is_finite:
            raise NonFiniteError(_not_finite("what goes through the model", b))
        return Reading(uses, _examine(tape, b, objective.layout, uses), tape.outputs.detach())


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
        unfit[name] = OTHER_ROWS
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
        return NO_SAMPLES
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
