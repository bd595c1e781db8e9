"""The data of an objective: every batch with its share of the mean, pinned or read again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import astuple, dataclass, replace
from typing import Protocol

import torch

from torchlinop.batches import (
    Batch,
    count_samples,
    detached_copy,
    pin,
    read,
    refuse_one_shot,
    split,
    tensors,
)
from torchlinop.errors import EmptyDataError, NonDeterministicDataError, WeightingError
from torchlinop.random_state import preserved_random_state, reseed
from torchlinop.settings import checks_wanted
from torchlinop.weighting import BATCH_MEAN, Weighting, weighed_alike


@dataclass(frozen=True)
class Sums:
    """What some batches come to."""

    total: float = 0.0  # loss terms
    batches: int = 0  # that hold any
    samples: int = 0  # of these; 0 if they cannot be counted
    passed: int = 0  # samples that the source gave, also those of no loss term

    def __add__(self, other: Sums) -> Sums:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Sums(*(a + b for a, b in pairs))


NOTHING = Sums()


class WeightedData(Protocol):
    """Batches b with shares ``w_b / Σ w`` (or 1 for a sum), in the same order at every pass.

    Σ w is over the batches of all processes, which stand one process after the other.
    """

    @property
    def pinned(self) -> bool: ...
    @property
    def weighting(self) -> Weighting: ...
    @property
    def own(self) -> Sums: ...  # of this process
    @property
    def before(self) -> Sums: ...  # of those that come before it
    @property
    def whole(self) -> Sums: ...  # of all
    @property
    def starts(self) -> tuple[int, ...]: ...  # how many samples the sources gave before batch b
    @property
    def why_passes_differ(self) -> str: ...
    def refuse_reordering(self) -> None: ...  # for matrices that depend on the order
    def everything(self) -> Iterator[Batch]: ...  # also what holds no loss term
    def silent(self) -> Iterator[Batch]: ...  # samples that no loss term is of, left out below
    def weighed(self, weighting: Weighting) -> WeightedData: ...  # in another way
    def among(self, before: Sums, whole: Sums) -> WeightedData: ...  # those of other processes

    def __iter__(self) -> Iterator[tuple[Batch, float]]: ...


@dataclass(frozen=True)
class PinnedData:
    """Batches held in memory: any source of data gives one fixed matrix."""

    parts: tuple[Batch, ...]  # all
    counts: tuple[float, ...]  # of loss terms
    weighting: Weighting
    own: Sums
    before: Sums
    whole: Sums
    starts: tuple[int, ...]
    pinned: bool = True
    why_passes_differ: str = "the loss itself is random"

    @classmethod
    def of(cls, parts: tuple[Batch, ...], weighting: Weighting) -> PinnedData:
        """Weigh the batches; those without a loss term (all labels masked) are left out."""
        counts = tuple(_count(weighting, part, b) for b, part in enumerate(parts))
        own, starts = _summed(zip(parts, counts, strict=True))
        _refuse_no_terms(own.total, weighting)
        return cls(parts, counts, weighting, own, NOTHING, own, starts)

    def refuse_reordering(self) -> None:
        """Pinned data keep their order."""

    def everything(self) -> Iterator[Batch]:
        yield from self.parts

    def silent(self) -> Iterator[Batch]:
        counted = zip(self.parts, self.counts, strict=True)
        return (part for part, count in counted if not count and count_samples(part))

    def weighed(self, weighting: Weighting) -> PinnedData:
        return PinnedData.of(self.parts, weighting)

    def among(self, before: Sums, whole: Sums) -> PinnedData:
        return replace(self, before=before, whole=whole, starts=_moved(self, before))

    def __iter__(self) -> Iterator[tuple[Batch, float]]:
        counted = zip(self.parts, self.counts, strict=True)
        return ((part, _share(self, count)) for part, count in counted if count)


@dataclass(frozen=True)
class RereadData:
    """Batches read from their source at every pass, for data that do not fit in memory."""

    source: Iterable[Batch]
    num_batches: int | None
    microbatch_size: int | None
    device: torch.device
    weighting: Weighting = BATCH_MEAN
    own: Sums = NOTHING
    before: Sums = NOTHING
    whole: Sums = NOTHING
    starts: tuple[int, ...] = ()
    pinned: bool = False

    @property
    def why_passes_differ(self) -> str:
        """The likeliest reason why two passes give different batches."""
        sampler = type(getattr(self.source, "sampler", None)).__name__
        if getattr(self.source, "drop_last", False):
            return f"{sampler} with drop_last=True"
        return "random augmentation, or data that change between passes"

    def __iter__(self) -> Iterator[tuple[Batch, float]]:
        total = 0.0
        for part in self.everything():
            count = self.weighting.count(part)
            total += count
            if count:
                yield part, _share(self, count)
        if not math.isclose(total, self.own.total, rel_tol=1e-9):
            raise NonDeterministicDataError(
                f"a pass over the data gave {total:.9g} {self.weighting.unit}, the first one "
                f"{self.own.total:.9g}: every product would be one of another matrix. "
                f"Cause: {self.why_passes_differ}. Pass pin_data=True or shuffle=False"
            )

    def refuse_reordering(self) -> None:
        """Raise NonDeterministicDataError unless two passes give the same batches in one order."""
        if not checks_wanted():
            return
        with preserved_random_state(self.device):
            passes = []
            for seed in (0, 1):
                reseed(seed, self.device)
                passes.append([_checksum(part) for part in self.everything()])
        if passes[0] != passes[1]:
            raise NonDeterministicDataError(
                "two passes over the data gave other batches, or another order, on which this "
                "matrix depends. Pass pin_data=True or shuffle=False"
            )

    def everything(self) -> Iterator[Batch]:
        with preserved_random_state(self.device):
            for batch in read(self.source, self.num_batches, self.device):
                yield from split(batch, self.microbatch_size)

    def silent(self) -> Iterator[Batch]:
        for part in self.everything():
            if not self.weighting.count(part) and count_samples(part):
                yield part

    def weighed(self, weighting: Weighting) -> RereadData:
        """One pass over the data, to count."""
        with closing(self.everything()) as parts:  # type: ignore[type-var]  # a generator
            counted = ((part, _count(weighting, part, b)) for b, part in enumerate(parts))
            own, starts = _summed(counted)
        _refuse_no_terms(own.total, weighting)
        return replace(self, weighting=weighting, own=own, before=NOTHING, whole=own, starts=starts)

    def among(self, before: Sums, whole: Sums) -> RereadData:
        return replace(self, before=before, whole=whole, starts=_moved(self, before))


def _summed(counted: Iterable[tuple[Batch, float]]) -> tuple[Sums, tuple[int, ...]]:
    """Sums over batches with their counts, and how many samples came before each that counts."""
    own = NOTHING
    starts: list[int] = []
    for part, count in counted:
        samples = count_samples(part) or 0
        if count:
            starts.append(own.passed)
        own += Sums(count, bool(count), samples if count else 0, samples)
    return own, tuple(starts)


def _share(data: WeightedData, count: float) -> float:
    return count / data.whole.total if data.weighting.mean else 1.0


def _moved(data: WeightedData, before: Sums) -> tuple[int, ...]:
    return tuple(start - data.before.passed + before.passed for start in data.starts)


def pinned_data(
    source: Iterable[Batch],
    num_batches: int | None,
    microbatch_size: int | None,
    device: torch.device,
    weighting_of: Callable[[tuple[Batch, ...]], Weighting],
) -> PinnedData:
    """Read the source once."""
    whole = pin(source, num_batches, device)
    parts = tuple(part for batch in whole for part in split(batch, microbatch_size))
    return PinnedData.of(parts, weighting_of(parts))


def reread_data(
    source: Iterable[Batch],
    num_batches: int | None,
    microbatch_size: int | None,
    device: torch.device,
    weighting_of: Callable[[tuple[Batch, ...]], Weighting],
) -> RereadData:
    """Read the source twice: to find the weighting on a few telling batches, and to count."""
    refuse_one_shot(source)
    data = RereadData(source, num_batches, microbatch_size, device)
    with closing(data.everything()) as parts:  # type: ignore[type-var]  # a generator
        seen = telling(parts)
    if not seen:
        pin(source, num_batches, device)  # raises EmptyDataError
    return data.weighed(weighting_of(seen))


_FIRST, _ODD = 8, 4  # batches to look into: the first ones, and others unlike these


def telling(parts: Iterable[Batch], few: int = _FIRST, odd_ones: int = _ODD) -> tuple[Batch, ...]:
    """The first batches, and some of those that rules weigh otherwise than the first."""
    first: list[Batch] = []
    odd: list[Batch] = []
    for part in parts:
        if len(first) < few:
            first.append(detached_copy(part))
        elif len(odd) < odd_ones and not weighed_alike(part, first[0]):
            odd.append(detached_copy(part))
    return (*first, *odd)


def _checksum(batch: Batch) -> list[float]:
    """A number for every tensor, which depends on the order of its entries."""
    flat = [tensor.flatten().double() for tensor in tensors(batch)]
    return [float(f @ torch.linspace(1, 2, len(f), dtype=f.dtype, device=f.device)) for f in flat]


def _count(weighting: Weighting, batch: Batch, b: int) -> float:
    count = weighting.count(batch)
    try:
        number = float(count)
    except TypeError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise WeightingError(
            f"expected weight(batch) to be a number of loss terms, 0 or more, got {count} "
            f"for batch {b}; return len(batch[1]), say"
        )
    return number


def _refuse_no_terms(total: float, weighting: Weighting) -> None:
    if not total:
        raise EmptyDataError(
            f"the data hold no loss term: 0 {weighting.unit} in all batches; "
            "check for empty batches and for labels that are all -100"
        )
