"""How much each batch counts: its number of loss terms, found by measuring the loss on parts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlinop.batches import Batch, count_samples, describe, join, take, tensors
from torchlinop.errors import NonFiniteError, WeightingError

IGNORED = -100  # the label that PyTorch's and Hugging Face's losses leave out

Count = Callable[[Batch], float]
Loss = Callable[[Batch], Tensor]  # a scalar


@dataclass(frozen=True)
class Weighting:
    """What a batch counts, and whether the objective is the mean over terms or their sum."""

    count: Count
    unit: str  # "samples", "unmasked labels", ..., for people
    mean: bool = True


def samples(batch: Batch) -> float:
    """Samples of the batch; NaN where they cannot be counted."""
    number = count_samples(batch)
    return math.nan if number is None else number


def labels(batch: Batch) -> Tensor | None:
    """The integer labels of a batch: under a usual key, or the last part of a tuple or list."""
    if isinstance(batch, Mapping):
        keys = ("labels", "label", "targets", "target", "decoder_labels")
        found = next((batch[key] for key in keys if key in batch), None)
    else:
        found = tensors(batch)[-1] if tensors(batch) else None
    integer = isinstance(found, Tensor) and not found.is_floating_point() and found.ndim > 0
    return found if integer else None


def unmasked_labels(batch: Batch) -> float:
    """Labels that are not -100."""
    found = labels(batch)
    return math.nan if found is None else float((found != IGNORED).sum())


def unmasked_next_tokens(batch: Batch) -> float:
    """Labels that are not -100 but for the first of each sequence: causal language models."""
    found = labels(batch)
    if found is None or found.ndim < 2:
        return math.nan
    return float((found[..., 1:] != IGNORED).sum())


def attended_tokens(batch: Batch) -> float:
    """Ones of the attention mask."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return float(mask.sum()) if isinstance(mask, Tensor) else math.nan


RULES = (
    Weighting(samples, "samples"),
    Weighting(unmasked_labels, "unmasked labels"),
    Weighting(unmasked_next_tokens, "unmasked next tokens"),
    Weighting(attended_tokens, "attended tokens"),
)
SUM = Weighting(lambda batch: 1.0, "batches", mean=False)
BATCH_MEAN = Weighting(lambda batch: 1.0, "batches")


def find_weighting(batches: Sequence[Batch], loss: Loss, roundoff: float) -> Weighting:
    """The rule under which the loss of two parts adds up to the loss of the whole.

    If L is a mean over terms and r counts them, ``r(A∪B) L(A∪B) = r(A) L(A) + r(B) L(B)``; if it
    is a sum, ``L(A∪B) = L(A) + L(B)``. Costs three evaluations of the loss, for batches only
    part of whose rules differ; nothing for a single batch, whose weight does not matter.

    Raises:
        WeightingError: no rule fits, or the batches are too small to tell.
        NonFiniteError: the loss is NaN or infinite.
    """
    counts = [[rule.count(batch) for batch in batches] for rule in RULES]
    possible = [r for r, c in zip(RULES, counts, strict=True) if not any(map(math.isnan, c))]
    if len(batches) == 1:
        return possible[0] if possible else BATCH_MEAN
    if not possible:
        raise WeightingError(_unknown(batches, "their samples cannot be counted"))
    parts = _telling_parts(batches, possible)
    if parts is None:
        if _agree(possible, batches):
            return possible[0]
        raise WeightingError(_unknown(batches, "no two of them can be joined to find out"))
    whole, a, b = parts
    losses = [loss(whole), loss(a), loss(b)]
    values = [float(value) for value in losses]
    if not math.isfinite(values[0]):
        raise NonFiniteError(
            f"the loss of {describe(whole)} with {count_samples(whole)} samples is {values[0]}; "
            "clean the data, or the parameters"
        )
    # The parts are summed in another order, so each loss carries some tens of roundoffs.
    roundoff = max(roundoff, torch.finfo(losses[0].dtype).eps)
    tolerance = 200 * roundoff * sum(abs(value) for value in values if math.isfinite(value))
    rules = [rule for rule in possible if rule.count(whole)]
    misfits = [abs(values[0] - _mean([a, b], values[1:], rule)) for rule in rules]
    misfits.append(abs(values[0] - values[1] - values[2]))
    fits = [(m, r) for m, r in zip(misfits, [*rules, SUM], strict=True) if m <= tolerance]
    if not fits:
        raise WeightingError(_unknown(batches, "no count explains the loss of their parts"))
    least = min(misfit for misfit, _ in fits)
    return next(rule for misfit, rule in fits if misfit <= 2 * least + tolerance / 50)


def _telling_parts(
    batches: Sequence[Batch], rules: Sequence[Weighting]
) -> tuple[Batch, Batch, Batch] | None:
    """A whole and its two parts that the rules weigh differently, if they ever do."""
    fallback = None
    for whole, a, b in itertools.islice(_wholes_and_parts(batches), 64):
        if not all(rule.count(whole) for rule in rules):
            continue
        if not _agree(rules, (a, b)):
            return whole, a, b
        fallback = fallback or (whole, a, b)
    return fallback if _agree(rules, batches) else None


def _mean(parts: Sequence[Batch], losses: Sequence[float], rule: Weighting) -> float:
    """The weighted mean; a part without terms, whose loss may be NaN, counts nothing."""
    counted = [(rule.count(part), value) for part, value in zip(parts, losses, strict=True)]
    total = sum(count for count, _ in counted)
    return sum(count * value for count, value in counted if count) / total


def _wholes_and_parts(batches: Sequence[Batch]) -> Iterator[tuple[Batch, Batch, Batch]]:
    for batch in batches:
        number = count_samples(batch) or 0
        if number > 1:
            third = max(1, number // 3)
            yield batch, take(batch, 0, third), take(batch, third, number)
    for a, b in itertools.combinations(batches[:8], 2):
        whole = join(a, b)
        if whole is not None:
            yield whole, a, b


def _agree(rules: Sequence[Weighting], batches: Sequence[Batch]) -> bool:
    """Whether all rules give the batches the same shares."""
    shares = []
    for rule in rules:
        counts = [rule.count(batch) for batch in batches]
        shares.append([count / sum(counts) if sum(counts) else 0.0 for count in counts])
    return all(math.isclose(x, y) for s in shares for x, y in zip(s, shares[0], strict=True))


def _unknown(batches: Sequence[Batch], reason: str) -> str:
    sizes = [count_samples(batch) for batch in batches[:8]]
    more = ", ..." if len(batches) > 8 else ""
    return (
        f"the batches ({describe(batches[0])} first) have {', '.join(map(str, sizes))}{more} "
        f"samples and a loss whose weights are unknown: {reason}. "
        'Pass weight=lambda batch: len(batch[1]), say, or weighting="batch-mean"'
    )
