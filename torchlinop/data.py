"""The data of an objective: every batch with its share of the mean, pinned or read again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from torchlinop.batches import Batch, count_samples, pin, read, refuse_one_shot, split
from torchlinop.errors import EmptyDataError, WeightingError
from torchlinop.random_state import preserved_random_state
from torchlinop.weighting import Weighting


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

    def __iter__(self) -> Iterator[tuple[Batch, float]]: ...


@dataclass(frozen=True)
class PinnedData:
    """Batches held in memory: any source of data gives one fixed matrix."""

    parts: tuple[Batch, ...]
    shares: tuple[float, ...]
    weighting: Weighting
    samples: int
    starts: tuple[int, ...]
    pinned: bool = True
    why_passes_differ: str = "the loss itself is random"

    @property
    def batches(self) -> int:
        return len(self.parts)

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
    )


def reread_data(
    source: Iterable[Batch],
    num_batches: int | None,
    microbatch_size: int | None,
    device: torch.device,
    weighting_of: Callable[[tuple[Batch, ...]], Weighting],
) -> RereadData:
    """Read the source twice to count (first a few batches to find the weighting, then all)."""
    refuse_one_shot(source)
    few = 8 if num_batches is None else min(8, num_batches)
    weighting = weighting_of(
        tuple(p for b in pin(source, few, device) for p in split(b, microbatch_size))
    )
    data = RereadData(source, num_batches, microbatch_size, device, weighting, math.nan, 0, 0, ())
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
