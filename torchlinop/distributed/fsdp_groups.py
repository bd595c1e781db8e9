"""The groups of parameters that FSDP2 gathers together: what is private to torch in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchlinop.errors import ShardingError

# What was read and is tested: the oldest torch that is supported, and the newest there was.
_OLDEST, _NEWEST = (2, 6), (2, 15)

# Methods of a parameter group of FSDP2 that are stepped into while dual numbers are inserted.
_INTERCEPTED = ("_to_unsharded", "_to_sharded", "_register_post_backward_hook")


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


def private_states(model: nn.Module) -> list[Any]:
    """The state of every part of the model that ``fully_shard`` was called on, once."""
    try:
        from torch.distributed._composable_state import _get_module_state
        from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
    except ImportError as error:
        raise ShardingError(_changed(str(error))) from error
    found = (_get_module_state(module) for module in model.modules())
    return list({id(state): state for state in found if isinstance(state, FSDPState)}.values())


def private_groups(model: nn.Module) -> list[Any]:
    """The groups of parameters that FSDP2 gathers together; several of a state since torch 2.10."""
    groups: list[Any] = []
    for state in private_states(model):
        several = getattr(state, "_fsdp_param_groups", None)
        groups += [state._fsdp_param_group] if several is None else several
    return [group for group in groups if group is not None]


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on the model or a part of it."""
    return bool(private_states(model))


def data_mesh(model: nn.Module) -> Any:
    """The mesh over which a model under ``fully_shard`` has different data."""
    meshes = {id(group.mesh_info.mesh): group.mesh_info.mesh for group in private_groups(model)}
    if len({tuple(mesh.mesh.flatten().tolist()) for mesh in meshes.values()}) != 1:
        raise ShardingError(
            f"expected one mesh for all calls of fully_shard, got {len(meshes)}; "
            "shard all parts of the model over the same ranks"
        )
    return next(iter(meshes.values()))


def compute_dtypes(model: nn.Module) -> list[torch.dtype]:
    """The dtypes that mixed-precision policies cast parameters to."""
    policies = [state._mp_policy for state in private_states(model)]
    return [policy.param_dtype for policy in policies if policy.param_dtype is not None]


def refuse_changed_torch(model: nn.Module) -> None:
    """Raise ShardingError unless FSDP2 has the private parts that are used here."""
    of_parameter = ("sharded_param", "_module_info", "padded_sharded_param_size")
    for group in private_groups(model):
        needed = ("fsdp_params", "is_unsharded", "mesh_info", *_INTERCEPTED)
        missing = {name for name in needed if not hasattr(group, name)}
        for parameter in getattr(group, "fsdp_params", ()):
            missing |= {name for name in of_parameter if not hasattr(parameter, name)}
        if missing:
            raise ShardingError(_changed(f"FSDP2 has no {', '.join(sorted(missing))}"))


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
    def origin(self) -> int:
        """The same for copies of one parameter; older torches do not tell."""
        number: int = getattr(self.private, "_orig_param_uid", id(self.private))
        return number

    @property
    def padded(self) -> torch.Size:
        """The shape that all shards have when those too small are filled up."""
        size: torch.Size = self.private.padded_sharded_param_size
        return size

    def replace(self, tensor: Tensor) -> None:
        """Let the modules compute with this, until the group is gathered or freed again."""
        of = self.private._module_info
        of.module._parameters[of.param_name] = tensor
        for module, name in zip(of.shared_modules, of.shared_param_names, strict=True):
            module._parameters[name] = tensor


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
    return [Group(group) for group in private_groups(model)]


def refuse_torn_ties(model: nn.Module) -> None:
    """Raise ShardingError for tied parameters of which several groups have a copy each."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    first: dict[int, str] = {}
    for group in groups(model):
        for parameter in group.parameters:
            name = names.get(id(parameter.sharded), "one that is replaced")
            if first.setdefault(parameter.origin, name) != name:
                raise ShardingError(
                    f"expected tied parameters in one group of fully_shard, got "
                    f"{first[parameter.origin]} in one and {name} in another, which torch does not "
                    "compute with; call fully_shard([a, b]) on the modules that share it"
                )
