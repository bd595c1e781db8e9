"""FSDP2 at rest: brought there wherever a pass was cut short, and given back as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from torchlinop.distributed.fsdp_groups import private_groups, private_states

# What FSDP2 leaves behind when a pass is cut short: attribute -> what it is at rest. Attributes
# that a version of torch does not have are left alone.
_GROUP_AT_REST: dict[str, Any] = {
    "_all_gather_result": None,
    "_post_reduce_event": None,
    "_all_reduce_state": None,
    "_reshard_after_forward_event": None,
    "_partial_reduce_output": None,
    "_post_backward_pending": False,
}
_ITERATION_AT_REST: dict[str, Any] = {
    "iter_forward_root": None,
    "post_backward_final_callback_queued": False,
    "manual_backward_finalization_active": None,
    "is_last_backward": True,
}
_COMMUNICATION_AT_REST: dict[str, Any] = {
    "all_gather_state": None,
    "reduce_scatter_state": None,
    "all_reduce_state": None,
}
# How a group reduces gradients, which users can change: attribute -> torch's default.
_GROUP_DEFAULTS: dict[str, Any] = {
    "reduce_grads": True,
    "all_reduce_grads": True,
    "reshard_after_backward": True,
    "unshard_in_backward": True,
    "gradient_divide_factor": None,
    "reduce_scatter_reduce_op": None,
    "_all_reduce_hook": None,
    "reduce_scatter_unused_params": False,
}


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 has gathered: while it is, writes to the shards are ignored."""
    for group in private_groups(model):
        group._to_sharded()


def heal(model: nn.Module) -> None:
    """Bring FSDP2 to rest, wherever an exception has left it: sharded, with nothing half done."""
    for state in private_states(model):
        state._training_state = type(state._training_state).IDLE
        state._modules_to_run_forward.clear()
        _set_present(state._state_ctx, _ITERATION_AT_REST)
        _set_present(state._comm_ctx, _COMMUNICATION_AT_REST)
        for name in ("post_forward_order", "reduce_scatter_states", "_last_post_reduce_events"):
            getattr(state._comm_ctx, name, []).clear()
    for group in private_groups(model):
        work = getattr(group._all_gather_result, "all_gather_work", None)
        if isinstance(work, dist.Work):
            work.wait()
        _set_present(group, _GROUP_AT_REST)
        group._post_forward_indices.clear()
        group._training_state = type(group._training_state).IDLE
        for parameter in group.fsdp_params:
            _take_unsharded_gradients(parameter)
        group._to_sharded()


def _set_present(holder: Any, values: dict[str, Any]) -> None:
    vars(holder).update({name: value for name, value in values.items() if name in vars(holder)})


@contextmanager
def own_reductions(model: nn.Module) -> Iterator[None]:
    """Gradients are averaged over ranks as by default, and those held back are put aside."""
    groups, states = private_groups(model), private_states(model)
    attributes = (*_GROUP_DEFAULTS, "_partial_reduce_output")
    before = [{n: v for n, v in vars(group).items() if n in attributes} for group in groups]
    layouts = [dict(getattr(group, "_partial_reduce_output_layout", {})) for group in groups]
    last = [state._state_ctx.is_last_backward for state in states]
    held = [_take_unsharded_gradients(p) for group in groups for p in group.fsdp_params]
    for group in groups:
        _set_present(group, {**_GROUP_DEFAULTS, "_partial_reduce_output": None})
        getattr(group, "_partial_reduce_output_layout", {}).clear()
    for state in states:
        state._state_ctx.is_last_backward = True
    try:
        yield
    finally:
        heal(model)
        for group, values, layout in zip(groups, before, layouts, strict=True):
            vars(group).update(values)
            getattr(group, "_partial_reduce_output_layout", {}).update(layout)
        for state, value in zip(states, last, strict=True):
            state._state_ctx.is_last_backward = value
        for put_back in held:
            put_back()


def _take_unsharded_gradients(parameter: Any) -> Callable[[], None]:
    """Remove the gradients a parameter holds back from reduction; the result puts them back."""
    leaf: Tensor | None = getattr(parameter, "_unsharded_param", None)
    gradient = None if leaf is None else leaf.grad
    older = vars(parameter).get("unsharded_accumulated_grad")  # before torch 2.15
    if leaf is not None:
        leaf.grad = None
    if older is not None:
        parameter.unsharded_accumulated_grad = None

    def put_back() -> None:
        if leaf is not None:
            leaf.grad = gradient
        if older is not None:
            parameter.unsharded_accumulated_grad = older

    return put_back
