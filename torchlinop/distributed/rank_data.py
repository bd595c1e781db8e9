"""The data of ranks that compute together: in rounds, as many on every rank, weighted globally."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchlinop.batches import Batch, refuse_one_shot, tensors, to_device
from torchlinop.data import NOTHING, RereadData, WeightedData, pinned_data, telling
from torchlinop.distributed.agreement import agreed, gathered
from torchlinop.errors import DataError, EmptyDataError, NonDeterministicDataError, WeightingError
from torchlinop.fingerprint import fingerprint
from torchlinop.weighting import BATCH_MEAN, Weighting

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


Round = tuple[int, Batch, float]  # number of a batch, the batch, its share of the mean


@dataclass(frozen=True)
class RankData:
    """The batches of this rank, among those of all ranks, which stand one rank after the other."""

    batches: WeightedData
    rounds: int  # batches of the rank that has most

    def __iter__(self) -> Iterator[Round]:
        """Number, batch and share of the mean (or 1 for a sum), for every round.

        A rank that has run out repeats its last batch with share 0: collectives need all ranks.

        Raises:
            NonDeterministicDataError: a pass gives more batches, or fewer, than the first one did.
        """
        parts, batch = iter(self.batches), None
        first = self.batches.before.batches
        last = first + self.batches.own.batches - 1
        for b in range(first, first + self.rounds):
            following = next(parts, None)
            if following is None:
                yield min(b, last), batch, 0.0
            else:
                batch, share = following
                yield b, batch, share
        # Ends the pass: only then are data that are read again known to be what they were.
        if next(parts, None) is not None:
            raise NonDeterministicDataError(
                f"a pass over the data gave more than the {self.rounds} batches of the first one, "
                f"in as many rounds as all ranks take. Cause: {self.batches.why_passes_differ}. "
                "Pass pin_data=True or shuffle=False"
            )


@dataclass(frozen=True)
class DataSource:
    """What the user passed."""

    source: Iterable[Batch]
    num_batches: int | None
    microbatch_size: int | None
    pin_data: bool
    device: torch.device

    def unweighed(self) -> WeightedData:
        """The batches of this rank, of which each counts as much as any other."""
        how = (self.source, self.num_batches, self.microbatch_size, self.device)
        if self.pin_data:
            return pinned_data(*how, lambda parts: BATCH_MEAN)
        refuse_one_shot(self.source)
        return RereadData(*how)


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
        batches = given.unweighed()
        some = _some(batches)
        facts = _Facts.of(ranks.place, known, some)
    _refuse_contradictions(gathered(facts, group))
    if known is None:
        assert weighting_of is not None
        of_ranks = gathered(some, group)
        everywhere = [to_device(batch, given.device) for theirs in of_ranks for batch in theirs]
        with agreed(group):
            known = weighting_of(everywhere)
    with agreed(group):
        batches = batches.weighed(known)
    # Ranks in one place have the same data.
    owns = dict(gathered((ranks.place, batches.own), group))
    before = sum((own for place, own in owns.items() if place < ranks.place), NOTHING)
    whole = sum(owns.values(), NOTHING)
    return RankData(batches.among(before, whole), max(own.batches for own in owns.values()))


@dataclass(frozen=True)
class _Facts:
    """What ranks tell each other of their data, before any of them calls the model."""

    place: tuple[int, ...]
    rule: tuple[str, bool]  # by which batches are weighed
    batches: tuple[int, ...]  # fingerprints of some

    @classmethod
    def of(cls, place: tuple[int, ...], known: Weighting | None, some: Sequence[Batch]) -> _Facts:
        rule = ("measurement", True) if known is None else (known.unit, known.mean)
        seen = [int(fingerprint(tensor.flatten())) for tensor in tensors(list(some))]
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


def _some(batches: WeightedData) -> list[Any]:
    """The first batches, and some that rules weigh otherwise, in the memory of the host."""
    found = telling(batches.everything(), _FIRST, _ODD)
    if not found:
        raise EmptyDataError(
            "the data gave no batches; pass a list or a DataLoader, with at least one batch on "
            "every rank"
        )
    return [to_device(batch, _CPU) for batch in found]


_CPU = torch.device("cpu")
