"""All that is private to torch and needed to differentiate twice through its sharded models."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.tensor import DTensor, Replicate

from torchlinop.errors import ShardingError

# What was read and is tested: the oldest torch that is supported, and the newest there was.
_OLDEST, _NEWEST = (2, 6), (2, 15)

# What a parameter group of FSDP2 leaves behind when a backward pass is cut short: attribute of the
# group -> what it is at rest. Attributes that a version does not have are left alone.
_GROUP_AT_REST: dict[str, Any] = {
    "_all_gather_result": None,
    "_post_reduce_event": None,
    "_all_reduce_state": None,
    "_reshard_after_forward_event": None,
    "_partial_reduce_output": None,
    "_post_backward_pending": False,
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

# Where a group is intercepted while duals are inserted.
_INTERCEPTED = ("_to_unsharded", "_to_sharded", "_register_post_backward_hook")

# The local shard of a parameter -> the same entries of the direction, None for zeros.
TangentOf = Callable[[nn.Parameter], Tensor | None]


def version_note(version: str = torch.__version__) -> str:
    """Says that this version of torch was not seen when the private parts were read, or nothing."""
    major_minor = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if _OLDEST <= major_minor <= _NEWEST:
        return ""
    known = ".".join(map(str, _OLDEST)), ".".join(map(str, _NEWEST))
    return f"torch {version} is unknown here (known: {known[0]} to {known[1]})"


def is_fsdp1(module: nn.Module) -> bool:
    """Whether it is wrapped by the first, flat-parameter FSDP."""
    kinds = [kind.__name__ for kind in type(module).__mro__]
    return "FullyShardedDataParallel" in kinds


def _states(model: nn.Module) -> list[Any]:
    """The state of every part of the model that ``fully_shard`` was called on, once."""
    try:
        from torch.distributed._composable_state import _get_module_state
        from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
    except ImportError as error:
        raise ShardingError(_changed(f"{error}")) from error
    states: dict[int, Any] = {}
    for module in model.modules():
        state = _get_module_state(module)
        if isinstance(state, FSDPState):
            states[id(state)] = state
    return list(states.values())


def _groups(model: nn.Module) -> list[Any]:
    """The groups of parameters that FSDP2 gathers together."""
    groups = []
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
    if len(meshes) != 1:
        raise ShardingError(
            f"expected one mesh for all calls of fully_shard, got {len(meshes)}; "
            "shard all parts of the model over the same mesh"
        )
    (mesh,) = meshes.values()
    return mesh


def refuse_changed_torch(model: nn.Module) -> None:
    """Raise ShardingError unless FSDP2 has the private parts that are used here."""
    for group in _groups(model):
        missing = [
            name
            for name in ("fsdp_params", "is_unsharded", "mesh_info", *_INTERCEPTED)
            if not hasattr(group, name)
        ]
        for parameter in getattr(group, "fsdp_params", ()):
            names = ("sharded_param", "_setattr_on_modules", "padded_sharded_param_size")
            missing += [name for name in names if not hasattr(parameter, name)]
        if missing:
            raise ShardingError(_changed(f"FSDP2 has no {', '.join(sorted({*missing}))}"))


def _changed(what: str) -> str:
    return (
        f"the insides of torch {torch.__version__} are not those that exact products know ({what}); "
        'pass method="finite_difference", or use a torch from 2.6 to 2.15'
    )


@contextmanager
def own_reductions(model: nn.Module) -> Iterator[None]:
    """Gradients are averaged over ranks as by default, and those held back are put aside."""
    groups = _groups(model)
    settings = [
        {name: getattr(group, name) for name in _GROUP_DEFAULTS if hasattr(group, name)}
        for group in groups
    ]
    held = [_take_unsharded_gradients(p) for group in groups for p in group.fsdp_params]
    last = [state._state_ctx.is_last_backward for state in _states(model)]
    partial = [getattr(group, "_partial_reduce_output", None) for group in groups]
    layouts = [dict(getattr(group, "_partial_reduce_output_layout", {})) for group in groups]
    try:
        for group, values in zip(groups, settings, strict=True):
            vars(group).update({name: _GROUP_DEFAULTS[name] for name in values})
            if hasattr(group, "_partial_reduce_output"):
                group._partial_reduce_output = None
            getattr(group, "_partial_reduce_output_layout", {}).clear()
        for state in _states(model):
            state._state_ctx.is_last_backward = True
        yield
    finally:
        heal(model)
        for group, values, output, layout in zip(groups, settings, partial, layouts, strict=True):
            vars(group).update(values)
            if output is not None:
                group._partial_reduce_output = output
                group._partial_reduce_output_layout.update(layout)
        for state, value in zip(_states(model), last, strict=True):
            state._state_ctx.is_last_backward = value
        for put_back in held:
            put_back()


def _take_unsharded_gradients(parameter: Any) -> Callable[[], None]:
    """Remove the gradients a parameter holds back from reduction; the result puts them back."""
    leaf = getattr(parameter, "_unsharded_param", None)
    gradient = None if leaf is None else leaf.grad
    older = vars(parameter).get("unsharded_accumulated_grad")  # before torch 2.15
    _drop_unsharded_gradients(parameter)

    def put_back() -> None:
        if gradient is not None:
            leaf.grad = gradient
        if older is not None:
            parameter.unsharded_accumulated_grad = older

    return put_back


def _drop_unsharded_gradients(parameter: Any) -> None:
    leaf = getattr(parameter, "_unsharded_param", None)
    if leaf is not None:
        leaf.grad = None
    if "unsharded_accumulated_grad" in vars(parameter):
        parameter.unsharded_accumulated_grad = None


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 has gathered: while it is, writes to the shards are ignored."""
    for group in _groups(model):
        group._to_sharded()


def heal(model: nn.Module) -> None:
    """Bring FSDP2 to rest, wherever an exception has left it: sharded, with nothing half done."""
    for state in _states(model):
        idle = type(state._training_state).IDLE
        state._training_state = idle
        state._modules_to_run_forward.clear()
        _set_present(state._state_ctx, _ITERATION_AT_REST)
        _set_present(state._comm_ctx, _COMMUNICATION_AT_REST)
        state._comm_ctx.post_forward_order.clear()
        for name in ("reduce_scatter_states", "_last_post_reduce_events"):
            getattr(state._comm_ctx, name, []).clear()
    for group in _groups(model):
        pending = group._all_gather_result
        work = getattr(pending, "all_gather_work", None)
        if isinstance(work, dist.Work):
            work.wait()
        _set_present(group, _GROUP_AT_REST)
        group._post_forward_indices.clear()
        group._training_state = type(group._training_state).IDLE
        for parameter in group.fsdp_params:
            _drop_unsharded_gradients(parameter)
        group._to_sharded()


def _set_present(holder: Any, values: dict[str, Any]) -> None:
    vars(holder).update({name: value for name, value in values.items() if name in vars(holder)})


@contextmanager
def tangents(model: nn.Module, tangent_of: TangentOf, *, reverse: bool) -> Iterator[None]:
    """Inside, parameters are dual numbers wherever FSDP2 has gathered them.

    With ``reverse``, a backward pass reduces the tangents of gradients in place of gradients. To
    be entered inside a level of ``torch.autograd.forward_ad``.
    """
    with ExitStack() as stack:
        stack.enter_context(_forward_rules())
        for group in _groups(model):
            stack.enter_context(_Tangents(group, tangent_of, reverse).inserted())
        yield


class _Tangents:
    """Puts dual numbers where FSDP2 puts the gathered parameters of one group.

    Every gather of the parameters brings their tangents, in one all-gather of their own for every
    dtype; their memory is freed with that of the parameters, and filled again for a backward pass.
    """

    def __init__(self, group: Any, tangent_of: TangentOf, reverse: bool) -> None:
        self.group = group
        self.reverse = reverse
        pairs = [(p, tangent_of(p.sharded_param)) for p in group.fsdp_params]
        self.local = [(parameter, local) for parameter, local in pairs if local is not None]
        self.whole: dict[int, Tensor] = {}  # by id of the parameter
        self.hooks: list[Any] = []

    @contextmanager
    def inserted(self) -> Iterator[None]:
        group = self.group
        unshard, shard, register = (getattr(group, name) for name in _INTERCEPTED)

        def to_unsharded() -> None:
            was = group.is_unsharded
            unshard()
            if not was:
                self._gather()
                self._insert()

        def to_sharded() -> None:
            shard()
            for tangent in self.whole.values():
                tangent.untyped_storage().resize_(0)

        def register_post_backward_hook(args: Any, kwargs: Any) -> Any:
            registered = register(args, kwargs)
            # Autograd runs what was recorded last first: once more, so that gradients reach the
            # parameters before the node just recorded takes them away.
            self._insert()
            return registered

        mine = (to_unsharded, to_sharded, register_post_backward_hook)
        vars(group).update(zip(_INTERCEPTED, mine, strict=True))
        try:
            yield
        finally:
            for name in _INTERCEPTED:
                del vars(group)[name]
            for hook in self.hooks:
                hook.remove()

    def _insert(self) -> None:
        for parameter, _ in self.local:
            # A backward pass that computes activations again differentiates what it computes.
            with torch.set_grad_enabled(self.reverse):
                dual = forward_ad.make_dual(parameter._unsharded_param, self.whole[id(parameter)])
            parameter._setattr_on_modules(dual)

    def _gather(self) -> None:
        if not self.whole:
            for parameter, _ in self.local:
                leaf = parameter._unsharded_param
                self.whole[id(parameter)] = torch.empty_like(leaf, requires_grad=False)
                if self.reverse:
                    self.hooks.append(leaf.register_hook(_tangent))
        dtypes = dict.fromkeys(tangent.dtype for tangent in self.whole.values())
        for dtype in dtypes:
            self._gather_all([p for p in self.local if self.whole[id(p[0])].dtype == dtype], dtype)

    def _gather_all(self, local: list[tuple[Any, Tensor]], dtype: torch.dtype) -> None:
        """Fill the tangents of these parameters, by one all-gather."""
        process_group = getattr(self.group.mesh_info, "shard_process_group", None)
        ranks = 1 if process_group is None else process_group.size()
        sizes = [parameter.padded_sharded_param_size for parameter, _ in local]
        mine = torch.cat([_padded(t.to(dtype), s) for (_, t), s in zip(local, sizes, strict=True)])
        every = mine.new_empty(ranks, mine.numel())
        if process_group is None:
            every[0] = mine
        else:
            dist.all_gather_into_tensor(every.view(-1), mine, group=process_group)
        pieces = every.split([size.numel() for size in sizes], dim=1)
        for (parameter, _), size, piece in zip(local, sizes, pieces, strict=True):
            whole = self.whole[id(parameter)]
            dim = _sharded_dim(parameter)
            shards = [shard.view(size) for shard in piece.unbind(0)]
            storage = whole.untyped_storage()
            storage.resize_(whole.numel() * whole.element_size())
            with torch.autograd._unsafe_preserve_version_counter(whole):
                whole.copy_(torch.cat(shards, dim).narrow(dim, 0, whole.shape[dim]))


def _sharded_dim(parameter: Any) -> int:
    placements = [p for p in parameter.sharded_param.placements if p.is_shard()]
    return placements[-1].dim if placements else 0


def _padded(local: Tensor, size: torch.Size) -> Tensor:
    """The entries of a shard, with zeros up to the size all shards have: (size.numel(),)."""
    padded = local.new_zeros(size)
    if local.numel():
        padded[tuple(slice(0, length) for length in local.shape)] = local
    return padded.view(-1)


def _tangent(gradient: Tensor) -> Tensor:
    tangent = forward_ad.unpack_dual(gradient).tangent
    if tangent is None or tangent._is_zerotensor():
        return torch.zeros_like(forward_ad.unpack_dual(gradient).primal)
    return tangent


@contextmanager
def _forward_rules() -> Iterator[None]:
    """FSDP2's functions of autograd, which hand tensors through, hand tangents through."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import RegisterPostBackwardFunction

    def jvp(ctx: Any, group: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else t.view_as(t) for t in tangents)

    before = vars(RegisterPostBackwardFunction).get("jvp")
    RegisterPostBackwardFunction.jvp = staticmethod(jvp)
    try:
        yield
    finally:
        if before is None:
            del RegisterPostBackwardFunction.jvp
        else:
            RegisterPostBackwardFunction.jvp = before


@contextmanager
def twice_differentiable_dtensors() -> Iterator[None]:
    """Backward passes of DTensor's own functions are part of the graph.

    That of ``from_local`` hands out a redistributed local tensor without its graph (torch 2.6 to
    2.15); those of ``to_local`` and ``redistribute`` do so before torch 2.9.
    """
    from torch.distributed.tensor import _api, _redistribute

    mended: list[tuple[Any, Any]] = [(_api._FromTorchTensor, _from_local_backward)]
    if not hasattr(_redistribute, "NestedRedistribute"):
        mended += [(_api._ToTorchTensor, _to_local_backward)]
        mended += [(_redistribute.Redistribute, _redistribute_backward)]
    before = [function.backward for function, _ in mended]
    for function, backward in mended:
        function.backward = staticmethod(backward)
    try:
        yield
    finally:
        for (function, _), backward in zip(mended, before, strict=True):
            function.backward = staticmethod(backward)


def _from_local_backward(ctx: Any, gradient: Any) -> tuple[Any, ...]:
    if gradient is None:
        return (None,) * 7
    given = getattr(ctx, "grad_placements", None)
    placements = given or _summed(_first(ctx, "forward_input_placements", "previous_placement"))
    return gradient.redistribute(placements=placements).to_local(), *(None,) * 6


def _to_local_backward(ctx: Any, gradient: Any) -> tuple[Any, ...]:
    if gradient is None:
        return None, None
    spec = ctx.dtensor_spec
    return (
        DTensor.from_local(
            gradient,
            spec.mesh,
            ctx.grad_placements or _summed(spec.placements),
            run_check=False,
            shape=spec.shape,
            stride=spec.stride,
        ),
        None,
    )


def _redistribute_backward(ctx: Any, gradient: Any) -> tuple[Any, ...]:
    return gradient.redistribute(placements=_summed(ctx.current_spec.placements)), *(None,) * 4


def _first(ctx: Any, *names: str) -> Any:
    return next(getattr(ctx, name) for name in names if hasattr(ctx, name))


def _summed(placements: Any) -> tuple[Any, ...]:
    """What a gradient is placed as: whole where the value is a sum not taken yet."""
    return tuple(Replicate() if p.is_partial() else p for p in placements)


def compute_dtypes(model: nn.Module) -> list[torch.dtype]:
    """The dtypes that mixed-precision policies cast parameters to."""
    policies = [state._mp_policy for state in _states(model)]
    return [policy.param_dtype for policy in policies if policy.param_dtype is not None]
