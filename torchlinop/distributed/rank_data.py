"""The data of ranks that compute together: in rounds, as many on every rank, weighted globally."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchlinop.batches import (
    Batch,
    count_samples,
    detached_copy,
    pin,
    read,
    refuse_one_shot,
    split,
    tensors,
    to_device,
)
from torchlinop.distributed.agreement import agreed, gathered
from torchlinop.errors import DataError, EmptyDataError, WeightingError
from torchlinop.fingerprint import fingerprint
from torchlinop.random_state import preserved_random_state
from torchlinop.weighting import Weighting, weighed_alike

# Batches of every rank that the weighting is found on: the first, and others unlike the first.
_FIRST, _ODD = 2, 2


@dataclass(frozen=True)
class DataRanks:
    """The ranks with data of their own; sums over them, one all-reduce for every group.

    A mesh of several dimensions has a group for each; no group is a single such rank.
    """

    groups: tuple[dist.ProcessGroup, ...] = ()

    @property
    def size(self) -> int:
        number = 1
        for group in self.groups:
            number *= group.size()
        return number

    @property
    def place(self) -> tuple[int, ...]:
        """Which data this rank has: that of all ranks in the same place."""
        return tuple(dist.get_rank(group) for group in self.groups)

    def sum(self, local: Tensor) -> Tensor:
        """In place."""
        for group in self.groups:
            dist.all_reduce(local, group=group)
        return local


@dataclass(frozen=True)
class RankData:
    """The batches of this rank that hold loss terms, and what the batches of all ranks come to."""

    parts: Callable[[], Iterator[Batch]]
    weighting: Weighting
    pinned: bool
    total: float  # loss terms of all ranks
    batches: int  # of all ranks
    samples: int  # of all ranks; 0 if they cannot be counted
    rounds: int  # batches of the rank that has most

    def __iter__(self) -> Iterator[tuple[int, Batch, float]]:
        """Number, batch and share of the mean (or 1 for a sum), for every round.

        A rank that has run out repeats its last batch with share 0: collectives need all ranks.
        """
        parts, batch = self.parts(), None
        for b in range(self.rounds):
            following = next(parts, None)
            if following is None:
                yield b, batch, 0.0
            else:
                batch = following
                yield b, batch, self._share(batch)

    def _share(self, batch: Batch) -> float:
        return self.weighting.count(batch) / self.total if self.weighting.mean else 1.0


@dataclass(frozen=True)
class DataSource:
    """What the user passed."""

    source: Iterable[Batch]
    num_batches: int | None
    microbatch_size: int | None
    pin_data: bool
    device: torch.device


WeightingOf = Callable[[Sequence[Batch]], Weighting]


def rank_data(
    given: DataSource,
    weighting_of: WeightingOf | None,
    known: Weighting | None,
    ranks: DataRanks,
    group: dist.ProcessGroup,
) -> RankData:
    """Read the data of this rank; the weighting is that known, or found by ``weighting_of``.

    It is found on some batches of all ranks, which all ranks evaluate in the same order.

    Raises:
        DataError: on all ranks, what is wrong with the data of one.
    """
    with agreed(group):
        parts = _parts(given)
        telling = _telling(parts())
        facts = _Facts.of(ranks.place, known, telling)
    _refuse_contradictions(gathered(facts, group))
    if known is None:
        assert weighting_of is not None
        of_ranks = gathered(telling, group)
        everywhere = [to_device(batch, given.device) for theirs in of_ranks for batch in theirs]
        with agreed(group):
            known = weighting_of(everywhere)
    with agreed(group):
        counts = [(float(known.count(p)), count_samples(p) or 0) for p in parts()]
        _refuse_empty(counts, known)
    held = [(count, samples) for count, samples in counts if count]
    own = [sum(c for c, _ in held), len(held), sum(s for _, s in held)]
    sums = ranks.sum(torch.tensor(own, dtype=torch.float64, device=given.device)).tolist()
    most = torch.tensor(len(held), device=given.device)
    dist.all_reduce(most, dist.ReduceOp.MAX, group)
    weighting = known

    def with_terms() -> Iterator[Batch]:
        return (part for part in parts() if weighting.count(part))

    return RankData(
        with_terms, weighting, given.pin_data, sums[0], int(sums[1]), int(sums[2]), int(most)
    )


@dataclass(frozen=True)
class _Facts:
    """What ranks tell each other of their data, before any of them calls the model."""

    place: tuple[int, ...]
    rule: tuple[str, bool]  # by which batches are weighed
    batches: tuple[int, ...]  # fingerprints of some

    @classmethod
    def of(
        cls, place: tuple[int, ...], known: Weighting | None, telling: Sequence[Batch]
    ) -> _Facts:
        rule = ("measurement", True) if known is None else (known.unit, known.mean)
        seen = [int(fingerprint(tensor.flatten())) for tensor in tensors(telling)]
        return cls(place, rule, tuple(seen))


def _refuse_contradictions(of_ranks: Sequence[_Facts]) -> None:
    """Of facts that all ranks have, so that all of them raise the same."""
    rules = {facts.rule for facts in of_ranks}
    if len(rules) > 1:
        units = " and ".join(sorted(unit if mean else "a sum" for unit, mean in rules))
        raise WeightingError(
            f"the ranks weigh their batches differently, by {units}; pass the same loss, and the "
            "same weight= or weighting=, on every rank"
        )
    first: dict[tuple[int, ...], int] = {}
    for rank, facts in enumerate(of_ranks):
        other = first.setdefault(facts.place, rank)
        if of_ranks[other].batches != facts.batches:
            raise DataError(
                f"ranks {other} and {rank} have parts of the same copy of the model, and different "
                "batches; give the ranks of a tensor-parallel group the same data, or pass "
                "data_group=, of the ranks with data of their own"
            )


def _parts(given: DataSource) -> Callable[[], Iterator[Batch]]:
    """A pass over the data of this rank, cut into microbatches."""
    whole: Callable[[], Iterable[Batch]]
    if given.pin_data:
        pinned = pin(given.source, given.num_batches, given.device)

        def whole() -> Iterable[Batch]:
            return pinned
    else:
        refuse_one_shot(given.source)

        def whole() -> Iterable[Batch]:
            return read(given.source, given.num_batches, given.device)

    def parts() -> Iterator[Batch]:
        with preserved_random_state(given.device):
            for batch in whole():
                yield from split(batch, given.microbatch_size)

    return parts


def _telling(parts: Iterator[Batch]) -> list[Any]:
    """The first batches, and some that rules weigh otherwise, in the memory of the host."""
    first: list[Batch] = []
    odd: list[Batch] = []
    for part in parts:
        if len(first) < _FIRST:
            first.append(part)
        elif len(odd) < _ODD and not weighed_alike(part, first[0]):
            odd.append(part)
    if not first:
        raise EmptyDataError(
            "the data gave no batches; pass a list or a DataLoader, with at least one batch on "
            "every rank"
        )
    return [to_device(detached_copy(part), _CPU) for part in (*first, *odd)]


_CPU = torch.device("cpu")


def _refuse_empty(counts: list[tuple[float, int]], weighting: Weighting) -> None:
    if not sum(count for count, _ in counts):
        raise EmptyDataError(
            f"the data hold no loss term: 0 {weighting.unit} in all batches; give every rank "
            "batches with labels that are not all -100"
        )
