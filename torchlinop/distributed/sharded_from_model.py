"""From a sharded model, the data of every rank and a loss function to an objective."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchlinop.batches import Batch
from torchlinop.distributed import fsdp_groups, fsdp_rest
from torchlinop.distributed.agreement import agreed
from torchlinop.distributed.direct_use import refuse_direct_use
from torchlinop.distributed.rank_data import DataRanks, DataSource, rank_data
from torchlinop.distributed.replicas import DRIFT, refuse_different_replicas
from torchlinop.distributed.sharded_layout import ShardedLayout
from torchlinop.distributed.sharded_model import ShardedModel
from torchlinop.distributed.sharded_objective import ShardedObjective, together
from torchlinop.errors import OptionError, ShardingError
from torchlinop.from_model import refuse_changing_data
from torchlinop.model_state import Mode, unwrap
from torchlinop.objective import LossFn, scalar
from torchlinop.parameters import ParamFilter
from torchlinop.settings import checks_wanted
from torchlinop.weighting import BATCH_MEAN, Weighting
from torchlinop.weighting_trials import find_weighting

# What a model is sharded by: FSDP2 or HSDP; FSDP2 of tensor-parallel parameters; these alone.
Sharding = Literal["fsdp", "fsdp x tp", "tp"]


def sharding_of(module: nn.Module) -> Sharding:
    """How the parameters of a model are sharded.

    Raises:
        ShardingError: by FSDP1, not at all, only in part, or with tied parameters torn apart.
    """
    if any(fsdp_groups.is_fsdp1(part) for part in module.modules()):
        raise ShardingError(
            "FSDP1 (FullyShardedDataParallel) keeps flat parameters that cannot be differentiated "
            "twice; wrap the model by torch.distributed.fsdp.fully_shard instead: "
            "for block in model.blocks: fully_shard(block); fully_shard(model)"
        )
    parameters = dict(module.named_parameters())
    sharded = {n: p.data for n, p in parameters.items() if isinstance(p.data, DTensor)}
    if not sharded:
        raise ShardingError(
            f"no parameter of this {type(module).__name__} is sharded; use HessianOperator and "
            "its like, or DDPHessianOperator for a model that every rank has as a whole"
        )
    if not fsdp_groups.is_fully_sharded(module):
        return "tp"
    plain = [n for n, p in parameters.items() if n not in sharded and p.requires_grad]
    if plain:
        raise ShardingError(
            "no module that fully_shard was called on has these parameters, so that nobody adds up "
            f"their gradients: {', '.join(plain)}; call fully_shard(model) too"
        )
    fsdp_groups.refuse_torn_ties(module)
    dimensions = fsdp_groups.data_mesh(module).ndim
    return (
        "fsdp" if all(p.device_mesh.ndim == dimensions for p in sharded.values()) else "fsdp x tp"
    )


def data_ranks(
    module: nn.Module,
    sharding: Sharding,
    group: dist.ProcessGroup,
    data_group: dist.ProcessGroup | None,
) -> DataRanks:
    """The ranks that have data of their own.

    Raises:
        OptionError: it cannot be known, or is given where it is known.
    """
    if sharding != "tp":
        if data_group is not None:
            raise OptionError(
                "data_group is for tensor-parallel models without FSDP2, whose mesh says which "
                "ranks have data of their own; leave it out"
            )
        mesh = fsdp_groups.data_mesh(module)
        return DataRanks(tuple(mesh.get_group(d) for d in range(mesh.ndim)))
    if data_group is not None:
        return DataRanks((data_group,))
    sizes = {p.data.device_mesh.size() for p in module.parameters() if isinstance(p.data, DTensor)}
    if max(sizes) != group.size():
        raise OptionError(
            f"a tensor-parallel model on {max(sizes)} of {group.size()} ranks: it is unknown which "
            'ranks have the same data; pass data_group=mesh["dp"].get_group()'
        )
    return DataRanks()


def sharded_objective(
    model: nn.Module,
    dataloader: Iterable[Batch],
    function: LossFn,
    *,
    param_filter: ParamFilter | None,
    num_batches: int | None,
    microbatch_size: int | None,
    mode: Mode,
    weight: Callable[[Batch], float] | None,
    batch_mean: bool,
    pin_data: bool,
    seed: int,
    group: dist.ProcessGroup,
    data_group: dist.ProcessGroup | None,
    of_samples: bool = False,
) -> ShardedObjective:
    """Copy the shards of this rank, read its data, and find out how much each batch counts.

    All ranks of the group call this, with the same options.

    Raises:
        ShardingError, ParameterError, OptionError, DataError, on all ranks. ProcessGroupError: what
            several ranks hold is not the same on all of them.
    """
    with torch.inference_mode(False):
        with agreed(group):
            module = unwrap(model)
            fsdp_groups.refuse_changed_torch(module)
            fsdp_rest.reshard(module)  # a forward pass leaves the outermost parameters gathered
            sharding = sharding_of(module)
            ranks = data_ranks(module, sharding, group, data_group)
        layout = ShardedLayout.of(module, param_filter, group)
        alike = sharding == "fsdp"
        refuse_different_replicas(module, group, drift=0.0 if alike else DRIFT, buffers=alike)
        space = layout.space()
        with agreed(group):
            borrowed = ShardedModel(module, layout, mode, seed)

        def evaluate(batch: Batch) -> Tensor:
            # In eval mode always: dropout would hide how the loss is reduced.
            with borrowed.borrowed(mode="eval"), torch.no_grad():
                return together(lambda: scalar(function(borrowed.place(0), batch)), space, group)

        def weighting_of(batches: Sequence[Batch]) -> Weighting:
            return find_weighting(batches, evaluate, of_samples=of_samples)

        known: Weighting | None = getattr(function, "weighting", None)
        if weight is not None:
            known = Weighting(weight, "weights")
        if batch_mean:
            known = BATCH_MEAN
        given = DataSource(dataloader, num_batches, microbatch_size, pin_data, space.device)
        data = rank_data(given, weighting_of, known, ranks, group)
        averages = sharding != "tp"
        objective = ShardedObjective(
            function, borrowed, layout, space, data, ranks, group, averages
        )
        if averages:
            refuse_direct_use(objective)
        if not pin_data and space.agree(checks_wanted()):
            precision = layout.layout.precision
            refuse_changing_data(objective.loss, data.batches, precision, space.device)
        return objective
