"""The data of an objective: every batch with its share of the mean, pinned or read again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
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
from torchlinop.weighting import BATCH_MEAN, Weighting, weighed_alike


class WeightedData(Protocol):
    """Batches b with shares ``w_b / Σ w`` (or 1 for a sum), in the same order at every pass."""

    @property
    def pinned(self) -> bool: ...
    @property
    def weighting(self) -> Weighting: ...
    @property
    def samples(self) -> int: ...  # of all batches; 0 if they cannot be counted
    @property
    def batches(self) -> int: ...
    @property
    def starts(self) -> tuple[int, ...]: ...  # how many samples the source gave before batch b
    @property
    def why_passes_differ(self) -> str: ...
    def refuse_reordering(self) -> None: ...  # for matrices that depend on the order
    def silent(self) -> Iterator[Batch]: ...  # samples that no loss term is of, left out below

    def __iter__(self) -> Iterator[tuple[Batch, float]]: ...


@dataclass(frozen=True)
class PinnedData:
    """Batches held in memory: any source of data gives one fixed matrix."""

    parts: tuple[Batch, ...]
    shares: tuple[float, ...]
    weighting: Weighting
    samples: int
    starts: tuple[int, ...]
    without_terms: tuple[Batch, ...] = ()
    pinned: bool = True
    why_passes_differ: str = "the loss itself is random"

    @property
    def batches(self) -> int:
        return len(self.parts)

    def refuse_reordering(self) -> None:
        """Pinned data keep their order."""

    def silent(self) -> Iterator[Batch]:
        yield from self.without_terms

    def __iter__(self) -> Iterator[tuple[Batch, float]]:
        return zip(self.parts, self.shares, strict=True)


@dataclass(frozen=True)
class RereadData:
    """Batches read from their source at every pass, for data that do not fit in memory."""

    source: Iterable[Batch]
    num_batches: int | None
    microbatch_size: int | None
    device: torch.device
    weighting: Weighting
    total: float
    samples: int
    batches: int
    starts: tuple[int, ...]
    pinned: bool = False

    @property
    def why_passes_differ(self) -> str:
        """The likeliest reason why two passes give different batches."""
        sampler = type(getattr(self.source, "sampler", None)).__name__
        if getattr(self.source, "drop_last", False):
            return f"{sampler} with drop_last=True"
        return "random augmentation, or data that change between passes"

    def __iter__(self) -> Iterator[tuple[Batch, float]]:
        for part in self.parts():
            count = self.weighting.count(part)
            if count:
                yield part, count / self.total if self.weighting.mean else 1.0

    def refuse_reordering(self) -> None:
        """Raise NonDeterministicDataError unless two passes give the same batches in one order."""
        with preserved_random_state(self.device):
            passes = []
            for seed in (0, 1):
                reseed(seed, self.device)
                passes.append([_checksum(part) for part in self.parts()])
        if passes[0] != passes[1]:
            raise NonDeterministicDataError(
                "two passes over the data gave other batches, or another order, on which this "
                "matrix depends. Pass pin_data=True or shuffle=False"
            )

    def silent(self) -> Iterator[Batch]:
        for part in self.parts():
            if not self.weighting.count(part) and count_samples(part):
                yield part

    def parts(self) -> Iterator[Batch]:
        """All that the source gives, also what holds no loss term."""
        with preserved_random_state(self.device):
            for batch in read(self.source, self.num_batches, self.device):
                yield from split(batch, self.microbatch_size)


def pinned_data(
    source: Iterable[Batch],
    num_batches: int | None,
    microbatch_size: int | None,
    device: torch.device,
    weighting_of: Callable[[tuple[Batch, ...]], Weighting],
) -> PinnedData:
    """Read the source once; batches without a loss term (all labels masked) are left out."""
    whole = pin(source, num_batches, device)
    parts = tuple(part for batch in whole for part in split(batch, microbatch_size))
    weighting = weighting_of(parts)
    counts = [_count(weighting, part, b) for b, part in enumerate(parts)]
    _refuse_no_terms(sum(counts), weighting)
    samples = [count_samples(part) or 0 for part in parts]
    starts = [0, *itertools.accumulate(samples)]
    kept = [b for b, count in enumerate(counts) if count]
    total = sum(counts) if weighting.mean else 1.0
    return PinnedData(
        tuple(parts[b] for b in kept),
        tuple(counts[b] / total for b in kept),
        weighting,
        sum(samples[b] for b in kept),
        tuple(starts[b] for b in kept),
        tuple(parts[b] for b, count in enumerate(counts) if not count and samples[b]),
    )


def reread_data(
    source: Iterable[Batch],
    num_batches: int | None,
    microbatch_size: int | None,
    device: torch.device,
    weighting_of: Callable[[tuple[Batch, ...]], Weighting],
) -> RereadData:
    """Read the source twice: to find the weighting on a few telling batches, and to count."""
    refuse_one_shot(source)
    data = RereadData(source, num_batches, microbatch_size, device, BATCH_MEAN, math.nan, 0, 0, ())
    with closing(data.parts()) as parts:  # type: ignore[type-var]  # a generator
        telling = _telling(parts)
    if not telling:
        pin(source, num_batches, device)  # raises EmptyDataError
    weighting = weighting_of(telling)
    data = replace(data, weighting=weighting)
    total, samples, passed = 0.0, 0, 0
    starts: list[int] = []
    with closing(data.parts()) as parts:  # type: ignore[type-var]  # a generator
        for part in parts:
            count, number = _count(weighting, part, len(starts)), count_samples(part) or 0
            if count:
                starts.append(passed)
                samples += number
            total += count
            passed += number
    _refuse_no_terms(total, weighting)
    return replace(data, total=total, samples=samples, batches=len(starts), starts=tuple(starts))


_FIRST, _ODD = 8, 4  # batches to look into: the first ones, and others unlike these


def _telling(parts: Iterable[Batch]) -> tuple[Batch, ...]:
    """The first batches, and some of those that rules weigh otherwise than the first."""
    first: list[Batch] = []
    odd: list[Batch] = []
    for part in parts:
        if len(first) < _FIRST:
            first.append(detached_copy(part))
        elif len(odd) < _ODD and not weighed_alike(part, first[0]):
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
