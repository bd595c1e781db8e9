"""f(θ) = Σ_b w_b L_b(θ) / Σ_b w_b over the batches of all ranks, at a θ in shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchlinop.batches import Batch
from torchlinop.distributed.agreement import raise_together
from torchlinop.distributed.rank_data import DataRanks, RankData, Round
from torchlinop.distributed.sharded_layout import ShardedLayout
from torchlinop.distributed.sharded_model import ShardedModel
from torchlinop.distributed.sharded_space import ShardedSpace
from torchlinop.objective import LossFn, scalar
from torchlinop.progress import batches_shown

Result = TypeVar("Result")
Outputs = Callable[[nn.Module, Any], Tensor]


def together(
    function: Callable[[], Result], space: ShardedSpace, group: dist.ProcessGroup
) -> Result:
    """What the function gives; what it raises on one rank, all raise, before they go on.

    Costs an all-reduce of one number. Errors between the collectives of a forward or backward
    pass leave the other ranks waiting, until their process group times out.
    """
    error: Exception | None = None
    try:
        result = function()
    except Exception as raised:
        error = raised
    if space.agree(error is not None):
        raise_together(error, group)
    return result


@dataclass(frozen=True)
class Rounds:
    """The rounds of a pass over the data, with a bar; a new pass every time."""

    objective: ShardedObjective

    def __iter__(self) -> Iterator[Round]:
        data = self.objective.data
        rounds = iter(data) if data.batches.pinned else self._read_together()
        return iter(batches_shown(rounds, data.rounds))

    def _read_together(self) -> Iterator[Round]:
        """A loader that fails on one rank ends all: one small all-reduce a round, and one more."""
        rounds = iter(self.objective.data)
        while (read := self.objective.together(lambda: next(rounds, None))) is not None:
            yield read


@dataclass(frozen=True)
class ShardedObjective:
    """The function that is differentiated, the model in shards, and the data of this rank."""

    function: LossFn  # (model, batch) -> scalar
    model: ShardedModel
    layout: ShardedLayout
    space: ShardedSpace
    data: RankData
    ranks: DataRanks
    group: dist.ProcessGroup  # all ranks that hold the model
    averages: bool  # whether a backward pass averages gradients over the ranks (FSDP2)

    @property
    def description(self) -> list[str]:
        """Facts for people: model and tensors, data and weights, ranks, mode."""
        layout, data = self.layout.layout, self.data.batches
        everything = len(layout.slots) + len(layout.frozen) + len(layout.filtered)
        mean = "mean" if data.weighting.mean else "sum"
        size = f"{data.whole.samples:,} samples in " if data.whole.samples else ""
        return [
            f"{type(self.model.module).__name__}, {len(layout.slots)} of {everything} tensors",
            f"{size}{data.whole.batches:,} batches on {self.ranks.size} ranks, "
            f"{mean} over {data.weighting.unit}",
            f"{self.model.mode} mode",
        ]

    def rounds(self) -> Iterable[Round]:
        """The batches of this rank and their shares; as many rounds on every rank."""
        return Rounds(self)

    def first_round(self) -> list[Round]:
        """One batch of every rank, the mean over ranks."""
        b, batch, _ = self.together(lambda: next(iter(self.data)))
        return [(b, batch, 1 / self.ranks.size)]

    def together(self, function: Callable[[], Result]) -> Result:
        """What the function gives; what it raises on one rank, all raise: see ``together``."""
        return together(function, self.space, self.group)

    def value(self, b: int, batch: Batch) -> Tensor:
        """L_b, a scalar, on all ranks or on none."""
        return self.together(lambda: scalar(self.function(self.model.place(b), batch)))

    def backward(self, scalar_value: Tensor, share: float) -> None:
        """Add ``share ∇scalar_value``, summed over ranks, to the gradients of the shards."""
        factor = share * self.ranks.size if self.averages else share
        (scalar_value * factor).backward()

    def collected(self) -> Tensor:
        """The local vector of what backward passes have added up."""
        local = self.model.take_gradients()
        return local if self.averages else self.summed(local)

    def summed(self, local: Tensor) -> Tensor:
        """The sum of the local vectors of ranks that have the same shards, and data of their own.

        They hold the shards in different orders, those that they own first.
        """
        if not self.ranks.groups:
            return local
        parts = self.layout.unflatten(local)
        bucket = self.ranks.sum(torch.cat([parts[name].reshape(-1) for name in self.layout.names]))
        pieces = bucket.split([parts[name].numel() for name in self.layout.names])
        of = dict(zip(self.layout.names, pieces, strict=True))
        return self.layout.flatten({n: of[n].view(parts[n].shape) for n in self.layout.names})

    def loss(self) -> Tensor:
        """f(θ): a scalar tensor, the same on all ranks. One forward pass over the data."""
        with self.model.borrowed(), torch.no_grad():
            total = torch.zeros((), dtype=torch.float64, device=self.space.device)
            for b, batch, share in self.rounds():
                total += share * self.value(b, batch)
        return self.ranks.sum(total).to(self.space.dtype)

    def gradient(self) -> Tensor:
        """∇f(θ): the local vector. One forward and backward pass over the data."""
        with self.model.borrowed():
            return self.gradient_here(self.rounds())

    def gradient_here(self, rounds: Iterable[Round]) -> Tensor:
        """The gradient at what is in the shards; to be called while the model is borrowed."""
        for b, batch, share in rounds:
            self.backward(self.value(b, batch), share)
        return self.collected()
