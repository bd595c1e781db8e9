"""All that is private to torch and needed to differentiate twice through its sharded models."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from torchlinop.errors import ShardingError

# What was read and is tested: the oldest torch that is supported, and the newest there was.
_OLDEST, _NEWEST = (2, 6), (2, 15)

# Methods of a parameter group of FSDP2 that are stepped into while dual numbers are inserted.
_INTERCEPTED = ("_to_unsharded", "_to_sharded", "_register_post_backward_hook")

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


def version_note(version: str = torch.__version__) -> str:
    """Says that this version of torch was not seen when the private parts were read, or nothing."""
    number = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if _OLDEST <= number <= _NEWEST:
        return ""
    return f"torch {version} is not known here, which was written for 2.6 to 2.15"


def _changed(what: str) -> str:
    return (
        f"torch {torch.__version__} has changed inside ({what}) since exact products were written "
        'for it; pass method="finite_difference", or install a torch from 2.6 to 2.15'
    )


def is_fsdp1(module: nn.Module) -> bool:
    """Whether it is wrapped by the first FSDP, that of flat parameters."""
    return any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__)


def _states(model: nn.Module) -> list[Any]:
    """The state of every part of the model that ``fully_shard`` was called on, once."""
    try:
        from torch.distributed._composable_state import _get_module_state
        from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
    except ImportError as error:
        raise ShardingError(_changed(str(error))) from error
    found = (_get_module_state(module) for module in model.modules())
    return list({id(state): state for state in found if isinstance(state, FSDPState)}.values())


def _groups(model: nn.Module) -> list[Any]:
    """The groups of parameters that FSDP2 gathers together; several of a state since torch 2.10."""
    groups: list[Any] = []
    for state in _states(model):
        several = getattr(state, "_fsdp_param_groups", None)
        groups += [state._fsdp_param_group] if several is None else several
    return [group for group in groups if group is not None]


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on the model or a part of it."""
    return bool(_states(model))


def data_mesh(model: nn.Module) -> Any:
    """The mesh over which a model under ``fully_shard`` has different data."""
    meshes = {id(group.mesh_info.mesh): group.mesh_info.mesh for group in _groups(model)}
    if len({tuple(mesh.mesh.flatten().tolist()) for mesh in meshes.values()}) != 1:
        raise ShardingError(
            f"expected one mesh for all calls of fully_shard, got {len(meshes)}; "
            "shard all parts of the model over the same ranks"
        )
    return next(iter(meshes.values()))


def compute_dtypes(model: nn.Module) -> list[torch.dtype]:
    """The dtypes that mixed-precision policies cast parameters to."""
    policies = [state._mp_policy for state in _states(model)]
    return [policy.param_dtype for policy in policies if policy.param_dtype is not None]


def refuse_changed_torch(model: nn.Module) -> None:
    """Raise ShardingError unless FSDP2 has the private parts that are used here."""
    of_parameter = ("sharded_param", "_setattr_on_modules", "padded_sharded_param_size")
    for group in _groups(model):
        needed = ("fsdp_params", "is_unsharded", "mesh_info", *_INTERCEPTED)
        missing = {name for name in needed if not hasattr(group, name)}
        for parameter in getattr(group, "fsdp_params", ()):
            missing |= {name for name in of_parameter if not hasattr(parameter, name)}
        if missing:
            raise ShardingError(_changed(f"FSDP2 has no {', '.join(sorted(missing))}"))


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 has gathered: while it is, writes to the shards are ignored."""
    for group in _groups(model):
        group._to_sharded()


def heal(model: nn.Module) -> None:
    """Bring FSDP2 to rest, wherever an exception has left it: sharded, with nothing half done."""
    for state in _states(model):
        state._training_state = type(state._training_state).IDLE
        state._modules_to_run_forward.clear()
        _set_present(state._state_ctx, _ITERATION_AT_REST)
        _set_present(state._comm_ctx, _COMMUNICATION_AT_REST)
        for name in ("post_forward_order", "reduce_scatter_states", "_last_post_reduce_events"):
            getattr(state._comm_ctx, name, []).clear()
    for group in _groups(model):
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
    groups, states = _groups(model), _states(model)
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


@dataclass(frozen=True)
class GatheredParameter:
    """A parameter of a group, in shards and, while its group is gathered, as a whole."""

    private: Any

    @property
    def sharded(self) -> nn.Parameter:
        parameter: nn.Parameter = self.private.sharded_param
        return parameter

    @property
    def whole(self) -> nn.Parameter:
        """A leaf of autograd: the same object every time, with memory while it is gathered."""
        parameter: nn.Parameter = self.private._unsharded_param
        return parameter

    @property
    def padded(self) -> torch.Size:
        """The shape that all shards have when those too small are filled up."""
        size: torch.Size = self.private.padded_sharded_param_size
        return size

    def replace(self, tensor: Tensor) -> None:
        """Let the modules compute with this, until the group is gathered or freed again."""
        self.private._setattr_on_modules(tensor)


@dataclass(frozen=True)
class Group:
    """Parameters that FSDP2 gathers together."""

    private: Any

    @property
    def parameters(self) -> list[GatheredParameter]:
        return [GatheredParameter(parameter) for parameter in self.private.fsdp_params]

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that it is sharded over."""
        return getattr(self.private.mesh_info, "shard_process_group", None)

    @contextmanager
    def watched(
        self,
        gathered: Callable[[], None],
        freed: Callable[[], None],
        registered: Callable[[], None],
    ) -> Iterator[None]:
        """Be called after FSDP2 has gathered the parameters, has freed them, and has recorded the
        node of autograd that takes their gradients away.
        """
        group = self.private
        unshard, shard, register = (getattr(group, name) for name in _INTERCEPTED)

        def to_unsharded() -> None:
            was = group.is_unsharded
            unshard()
            if not was:
                gathered()

        def to_sharded() -> None:
            shard()
            freed()

        def register_post_backward_hook(args: Any, kwargs: Any) -> Any:
            result = register(args, kwargs)
            registered()
            return result

        mine = (to_unsharded, to_sharded, register_post_backward_hook)
        vars(group).update(zip(_INTERCEPTED, mine, strict=True))
        try:
            yield
        finally:
            for name in _INTERCEPTED:
                del vars(group)[name]
            # Without a backward pass, the outermost group would stay gathered, and replaced.
            group._to_sharded()


def groups(model: nn.Module) -> list[Group]:
    """The parameters that FSDP2 gathers together, group by group."""
    return [Group(group) for group in _groups(model)]


@contextmanager
def _methods(mended: list[tuple[Any, str, Callable[..., Any]]]) -> Iterator[None]:
    """Static methods of functions of autograd, replaced inside."""
    before = [vars(function).get(name) for function, name, _ in mended]
    for function, name, method in mended:
        setattr(function, name, staticmethod(method))
    try:
        yield
    finally:
        for (function, name, _), method in zip(mended, before, strict=True):
            if method is None:
                delattr(function, name)
            else:
                setattr(function, name, method)


@contextmanager
def forward_rules() -> Iterator[None]:
    """FSDP2's functions of autograd, which hand tensors through, hand tangents through."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    def jvp(ctx: Any, group: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else t.view_as(t) for t in tangents)

    with _methods([(_fsdp_param_group.RegisterPostBackwardFunction, "jvp", jvp)]):
        yield


def refilled(saved: Tensor) -> AbstractContextManager[None]:
    """Inside, a tensor that autograd has saved may be written to: with the values that it had."""
    held: AbstractContextManager[None]
    held = torch.autograd._unsafe_preserve_version_counter(saved)  # type: ignore[attr-defined]
    return held


def is_zero(tangent: Tensor) -> bool:
    """Whether it is a zero without memory, which cannot be written to."""
    return bool(tangent._is_zerotensor())


@contextmanager
def twice_differentiable_dtensors() -> Iterator[None]:
    """Backward passes of DTensor's own functions are part of the graph.

    That of ``from_local`` hands out a redistributed local tensor without its graph (torch 2.6 to
    2.15); before ``NestedRedistribute`` came, so did those of ``to_local`` and ``redistribute``.
    """
    from torch.distributed.tensor import _api, _redistribute

    mended: list[tuple[Any, str, Callable[..., Any]]]
    mended = [(_api._FromTorchTensor, "backward", _from_local_backward)]
    if not hasattr(_redistribute, "NestedRedistribute"):
        mended += [(_api._ToTorchTensor, "backward", _to_local_backward)]
        mended += [(_redistribute.Redistribute, "backward", _redistribute_backward)]
    with _methods(mended):
        yield


def _from_local_backward(ctx: Any, gradient: Any) -> tuple[Any, ...]:
    if gradient is None:
        return (None,) * 7
    names = ("forward_input_placements", "previous_placement")
    forward = next(getattr(ctx, name) for name in names if hasattr(ctx, name))
    placements = getattr(ctx, "grad_placements", None) or _summed(forward)
    return gradient.redistribute(placements=placements).to_local(), *(None,) * 6


def _to_local_backward(ctx: Any, gradient: Any) -> tuple[Any, ...]:
    spec = ctx.dtensor_spec
    placements = ctx.grad_placements or _summed(spec.placements)
    whole = {"run_check": False, "shape": spec.shape, "stride": spec.stride}
    return DTensor.from_local(gradient, spec.mesh, placements, **whole), None


def _redistribute_backward(ctx: Any, gradient: Any) -> tuple[Any, ...]:
    return gradient.redistribute(placements=_summed(ctx.current_spec.placements)), *(None,) * 4


def _summed(placements: Any) -> tuple[Any, ...]:
    """What a gradient is placed as: whole where the value is a sum not taken yet."""
    return tuple(Replicate() if p.is_partial() else p for p in placements)
