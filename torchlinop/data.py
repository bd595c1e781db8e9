"""The data of an objective: every batch with its share of the mean, pinned or read again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
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
    def why_passes_differ(self) -> str: ...

    def __iter__(self) -> Iterator[tuple[Batch, float]]: ...


@dataclass(frozen=True)
class PinnedData:
    """Batches held in memory: any source of data gives one fixed matrix."""

    parts: tuple[Batch, ...]
    shares: tuple[float, ...]
    weighting: Weighting
    samples: int
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
    pinned: bool = False

    @property
    def why_passes_differ(self) -> str:
        """The likeliest reason why two passes give different batches."""
        sampler = type(getattr(self.source, "sampler", None)).__name__
        if getattr(self.source, "drop_last", False):
            return f"{sampler} with drop_last=True"
        return "random augmentation, or data that change between passes"

    def __iter__(self) -> Iterator[tuple[Batch, float]]:
        with preserved_random_state(self.device):
            for batch in read(self.source, self.num_batches, self.device):
                for part in split(batch, self.microbatch_size):
                    count = self.weighting.count(part)
                    if count:
                        yield part, count / self.total if self.weighting.mean else 1.0


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
    kept = [(p, c) for p, c in zip(parts, counts, strict=True) if c]
    total = sum(counts) if weighting.mean else 1.0
    return PinnedData(
        tuple(part for part, _ in kept),
        tuple(count / total for _, count in kept),
        weighting,
        sum(count_samples(part) or 0 for part, _ in kept),
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
    data = RereadData(source, num_batches, microbatch_size, device, weighting, math.nan, 0, 0)
    total, samples, batches = 0.0, 0, 0
    with closing(iter(data)) as parts:  # type: ignore[type-var]  # a generator
        for part, _ in parts:
            total += _count(weighting, part, batches)
            samples += count_samples(part) or 0
            batches += 1
    _refuse_no_terms(total, weighting)
    return RereadData(
        source, num_batches, microbatch_size, device, weighting, total, samples, batches
    )


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
