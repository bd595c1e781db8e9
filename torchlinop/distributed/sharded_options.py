"""The keywords of operators of sharded models, and the objective that they describe."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch.distributed as dist
from torch import nn

from torchlinop.batches import Batch
from torchlinop.choices import refuse_unknown_options
from torchlinop.distributed.agreement import agreed, gathered, process_group
from torchlinop.distributed.sharded_from_model import sharded_objective
from torchlinop.distributed.sharded_objective import ShardedObjective
from torchlinop.errors import OptionError
from torchlinop.from_model import (
    ObjectiveOptions,
    refuse_bad_options,
    refuse_bad_seed,
)
from torchlinop.objective import LossFn

MethodName = Literal["auto", "forward_over_reverse", "finite_difference", "autograd"]


class ShardedOptions(ObjectiveOptions, total=False):
    """Keywords of every operator of a sharded model."""

    # "auto" (the default): exact where torch allows it, "finite_difference" elsewhere, which is
    # logged. "forward_over_reverse" (exact; FSDP2 and HSDP), "autograd" (exact; tensor parallel).
    method: MethodName
    # Compare a product of one batch with finite differences when the operator is built.
    self_test: bool
    fd_step: float | None  # |θ₊ − θ₋| / 2|θ| of differences; measured by default
    force: bool  # differences also in half precision; default False
    process_group: dist.ProcessGroup | None  # the ranks that hold the model; all by default
    data_group: dist.ProcessGroup | None  # ranks with data of their own; of a mesh known otherwise


@dataclass(frozen=True)
class MethodOptions:
    """What concerns the way of multiplying."""

    method: MethodName = "auto"
    self_test: bool = True
    fd_step: float | None = None
    force: bool = False


def objective_of(
    model: nn.Module,
    dataloader: Iterable[Batch],
    function: LossFn,
    options: ShardedOptions,
    *,
    of_samples: bool = False,
) -> tuple[ShardedObjective, MethodOptions]:
    """The objective, and the options of its products.

    Raises:
        OptionError: an option is unknown, not among its choices, or another one on another rank;
            and as ``sharded_objective``.
    """
    given = cast(ShardedOptions, dict(options))
    group = process_group(given.get("process_group"))
    with agreed(group):
        refuse_unknown_options(given, ShardedOptions.__optional_keys__)
        number = given.get("num_batches")
        microbatch, weight = given.get("microbatch_size"), given.get("weight")
        weighting = given.get("weighting", "auto")
        refuse_bad_options(number, microbatch, weight, weighting)
        refuse_bad_seed("seed", given.get("seed", 0))
    method = MethodOptions(
        given.get("method", "auto"),
        given.get("self_test", True),
        given.get("fd_step"),
        given.get("force", False),
    )
    mode, pin_data = given.get("mode", "eval"), given.get("pin_data", True)
    seed = given.get("seed", 0)
    _refuse_differences(asdict(method) | {"mode": mode, "seed": seed, "pin_data": pin_data}, group)
    full = given.get("full_dataset", True)
    objective = sharded_objective(
        model,
        dataloader,
        function,
        param_filter=given.get("param_filter"),
        num_batches=number if full or number else 1,
        microbatch_size=microbatch,
        mode=mode,
        weight=weight,
        batch_mean=weighting == "batch-mean",
        pin_data=pin_data,
        seed=seed,
        group=group,
        data_group=given.get("data_group"),
        of_samples=of_samples,
    )
    return objective, method


def _refuse_differences(options: dict[str, Any], group: dist.ProcessGroup) -> None:
    """Raise OptionError, on all ranks, if these options are not the same on all of them."""
    first, *others = gathered(options, group)
    for rank, theirs in enumerate(others, 1):
        for name, value in first.items():
            if theirs[name] != value:
                raise OptionError(
                    f"the ranks differ in {name}: {value!r} on rank 0, {theirs[name]!r} on rank "
                    f"{rank}; build the operator with the same options on every rank"
                )
