"""How much a batch counts: its number of loss terms, by one of a few rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchlinop.batches import Batch, count_samples, split, tensors

LABELS = ("labels", "label", "targets", "target", "decoder_labels", "y")  # their usual keys
IGNORED = -100  # the label that PyTorch's and Hugging Face's losses leave out

Count = Callable[[Batch], float]
Marks = Callable[[Batch], Tensor | None]  # (N, ...), a number of loss terms at every place


@dataclass(frozen=True)
class Weighting:
    """What a batch counts, and whether the objective is the mean over terms or their sum."""

    count: Count
    unit: str  # "samples", "unmasked labels", ..., for people
    mean: bool = True
    marks: Marks | None = None  # what the samples count, all at once: their marks summed
    measured: bool = field(default=False, compare=False)  # by the losses of parts of batches


def samples(batch: Batch) -> Tensor | None:
    """A one for every sample."""
    number = count_samples(batch)
    return None if number is None else torch.ones(number)


def labels(batch: Batch) -> Tensor | None:
    """The integer labels of a batch: under a usual key, or the last part of a tuple or list."""
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in LABELS if key in batch), None)
    else:
        found = tensors(batch)[-1] if tensors(batch) else None
    integer = isinstance(found, Tensor) and not found.is_floating_point() and found.ndim > 0
    return found if integer else None


def unmasked_labels(batch: Batch) -> Tensor | None:
    """Labels that are not -100."""
    found = labels(batch)
    return None if found is None else found != IGNORED


def unmasked_next_tokens(batch: Batch) -> Tensor | None:
    """Labels that are not -100 but for the first of each sequence: causal language models."""
    found = labels(batch)
    return None if found is None or found.ndim < 2 else found[..., 1:] != IGNORED


def attended_tokens(batch: Batch) -> Tensor | None:
    """Ones of the attention mask."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) else None


@dataclass(frozen=True)
class Sum:
    """The sum of a batch's marks; NaN where it has none."""

    marks: Marks

    def __call__(self, batch: Batch) -> float:
        marks = self.marks(batch)
        return math.nan if marks is None else float(marks.sum())


def one(batch: Batch) -> float:
    """Every batch alike."""
    return 1.0


RULES = tuple(
    Weighting(Sum(marks), unit, marks=marks)
    for marks, unit in (
        (samples, "samples"),
        (unmasked_labels, "unmasked labels"),
        (unmasked_next_tokens, "unmasked next tokens"),
        (attended_tokens, "attended tokens"),
    )
)
SUM = Weighting(one, "batches", mean=False, marks=samples)
BATCH_MEAN = Weighting(one, "batches", marks=samples)


def sample_weights(weighting: Weighting, batch: Batch) -> Tensor:
    """ω_i (N,) in ``L(batch) = Σ_i ω_i L(sample i)``: shares of a mean, or ones in a sum."""
    counts = sample_counts(weighting, batch)
    return counts / counts.sum() if weighting.mean else torch.ones_like(counts)


def weighed_alike(a: Batch, b: Batch) -> bool:
    """Whether all rules give the samples of both batches the same weight on average."""

    def counts(batch: Batch) -> list[float]:
        return [rule.count(batch) / max(1, count_samples(batch) or 1) for rule in RULES]

    pairs = zip(counts(a), counts(b), strict=True)
    return all(math.isclose(x, y) or (math.isnan(x) and math.isnan(y)) for x, y in pairs)


def sample_counts(weighting: Weighting, batch: Batch) -> Tensor:
    """What every sample counts: (N,) in float64."""
    marks = weighting.marks(batch) if weighting.marks else None
    if marks is None or len(marks) != count_samples(batch):
        return torch.tensor([weighting.count(s) for s in split(batch, 1)], dtype=torch.float64)
    per_sample = marks.flatten(1).sum(1, dtype=torch.float64) if marks.ndim > 1 else marks.double()
    return per_sample.cpu()
