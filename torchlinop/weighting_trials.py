"""Which rule says how much a batch counts: found by measuring the loss on parts of batches."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from torchlinop.batches import Batch, can_be_cut, count_samples, describe, join, take
from torchlinop.errors import NonFiniteError, SampleMixingError, WeightingError
from torchlinop.weighting import BATCH_MEAN, RULES, SUM, Weighting, sample_counts

Loss = Callable[[Batch], Tensor]  # a scalar
Trial = tuple[Batch, Batch, Batch]  # a whole and its two parts

_PROBED = 6  # batches that are looked into, spread evenly over the data
_ROWS = 6  # samples of a part, as long as these tell the rules apart
_COARSEST = 0.02  # a defect that no rounding explains, relative to the losses


def find_weighting(batches: Sequence[Batch], loss: Loss, *, of_samples: bool = False) -> Weighting:
    """The rule under which the losses of two parts add up to the loss of the whole.

    If L is a mean over terms and r counts them, ``r(A∪B) L(A∪B) = r(A) L(A) + r(B) L(B)``; if it
    is a sum, ``L(A∪B) = L(A) + L(B)``. This is asked of a few samples of some batches, and of
    neighbouring batches joined; the rules that pass must give all batches the same shares. Costs
    some thirty forward passes of a few samples, whatever the size of the data; nothing for a
    single batch, whose weight does not matter. With ``of_samples`` every sample is weighed, also
    those of a single batch.

    Raises:
        WeightingError: no rule fits, or several do that weigh the batches differently.
        NonFiniteError: the loss is NaN or infinite.
    """
    possible = _possible(batches)
    if len(batches) == 1 and not of_samples:
        return replace(possible[0] if possible else BATCH_MEAN, measured=True)
    return replace(explaining(batches, loss, of_samples=of_samples)[0], measured=True)


def explaining(
    batches: Sequence[Batch], loss: Loss, *, of_samples: bool = False
) -> list[Weighting]:
    """The rules that pass: all of them give these batches the same shares.

    Raises:
        WeightingError, NonFiniteError: as ``find_weighting``.
    """
    possible = _possible(batches)
    if not possible:
        raise WeightingError(unknown_weights(batches, "their samples cannot be counted"))
    known, few = _once(loss), functools.cache(lambda index: head(batches[index]))
    noise = _noise(batches, few, known)
    try:
        alive = _survivors([*possible, SUM], _trials(batches, few), batches, known, noise)
    except WeightingError as error:
        if not of_samples:
            raise
        raise SampleMixingError(
            f"expected a loss that does not mix samples, for a per-sample matrix: {error}, or use "
            "HessianOperator or GGNOperator"
        ) from error
    if not _agree(alive, batches, of_samples):
        alive = _survivors(alive, _trials(batches, batches.__getitem__), batches, loss, noise)
    if not _agree(alive, batches, of_samples):
        units = ", ".join(rule.unit if rule.mean else "sum" for rule in alive)
        raise WeightingError(
            unknown_weights(batches, f"{units} all explain the loss of their parts")
        )
    return alive


def _possible(batches: Sequence[Batch]) -> list[Weighting]:
    counts = [[rule.count(batch) for batch in batches] for rule in RULES]
    return [r for r, c in zip(RULES, counts, strict=True) if sum(c) > 0]  # not NaN


def _survivors(
    rules: list[Weighting],
    trials: Iterator[Trial],
    batches: Sequence[Batch],
    loss: Loss,
    noise: float,
) -> list[Weighting]:
    for trial in trials:
        losses = _losses(trial, batches, loss)
        rules = [rule for rule in rules if _explains(rule, trial, losses, noise)]
        if not rules and not torch.isfinite(losses[0]):
            raise NonFiniteError(
                f"the loss of {describe(trial[0])} with {count_samples(trial[0])} samples is "
                f"{float(losses[0])}; clean the data, or the parameters"
            )
        if not rules:
            raise WeightingError(
                unknown_weights(batches, "no count explains the loss of their parts")
            )
    return rules


def _losses(parts: Sequence[Batch], batches: Sequence[Batch], loss: Loss) -> list[Tensor]:
    """The loss of parts that were cut or joined here; an error on a whole batch is the user's."""
    try:
        return [loss(part) for part in parts]
    except Exception as error:
        loss(batches[0])
        reason = f"the loss of a part of a batch failed ({error})"
        raise WeightingError(unknown_weights(batches, reason)) from error


def _explains(rule: Weighting, trial: Trial, losses: Sequence[Tensor], noise: float) -> bool:
    whole, *parts = (float(value) for value in losses)
    counted = [(rule.count(part), value) for part, value in zip(trial[1:], parts, strict=True)]
    total = sum(count for count, _ in counted) if rule.mean else 1.0
    if not total:  # a whole without terms, of which a mean says nothing
        return True
    if not math.isfinite(whole):
        return False
    # A part without terms, whose loss may be NaN, counts nothing.
    predicted = sum(count * value for count, value in counted if count) / total
    # Sums in another order are off by some tens of roundoffs of the loss.
    roundoff = torch.finfo(losses[0].dtype).eps
    size = sum(abs(value) for value in (whole, *parts) if math.isfinite(value))
    return abs(whole - predicted) <= min(max(200 * roundoff, 20 * noise), _COARSEST) * size


def _once(loss: Loss) -> Loss:
    """The same loss, computed once for a part that is asked for again."""
    known: dict[int, tuple[Batch, Tensor]] = {}  # with the part, so that its id stays its own

    def of(part: Batch) -> Tensor:
        if id(part) not in known:
            known[id(part)] = part, loss(part)
        return known[id(part)][1]

    return of


def _noise(batches: Sequence[Batch], few: Callable[[int], Batch], loss: Loss) -> float:
    """How much a loss depends on the size of the batch by rounding alone, relative to it.

    Kernels for other sizes round otherwise, most of all in half precision. Measured on samples
    taken twice, of which every mean is that of once, and every sum the double.
    """
    noise = 0.0
    for index in _probed(batches):
        once = few(index)
        twice = join(once, once)
        if twice is not None:
            single, double = map(float, _losses((once, twice), batches, loss))
            defect = min(abs(double - single), abs(double - 2 * single))
            if math.isfinite(defect) and single:
                noise = max(noise, defect / abs(single))
    return noise


def _probed(batches: Sequence[Batch]) -> list[int]:
    """Numbers of some batches, spread evenly."""
    last = len(batches) - 1
    return sorted({round(i * last / (_PROBED - 1)) for i in range(_PROBED)})


def _trials(batches: Sequence[Batch], part: Callable[[int], Batch]) -> Iterator[Trial]:
    """Of ``part(index)``, all or some samples of a batch: cut in two, and neighbours joined."""
    for index in _probed(batches):
        a = part(index)
        number = count_samples(a) or 0
        if number > 1 and can_be_cut(a):
            third = max(1, number // 3)
            yield a, take(a, 0, third), take(a, third, number)
        b = part((index + 1) % len(batches))
        whole = join(a, b)
        if whole is not None:
            yield whole, a, b


def head(batch: Batch) -> Batch:
    """The first samples, if the batch can be cut."""
    number = count_samples(batch)
    if number is None or number <= _ROWS or not can_be_cut(batch):
        return batch
    return take(batch, 0, _ROWS)


def _agree(rules: Sequence[Weighting], batches: Sequence[Batch], of_samples: bool) -> bool:
    """Whether all rules are means, or sums, that give the batches, or samples, the same shares."""
    shares = []
    for rule in rules if len(rules) > 1 else ():
        if of_samples:
            counts = torch.cat([sample_counts(rule, batch) for batch in batches])
        else:
            counts = torch.tensor([rule.count(batch) for batch in batches], dtype=torch.float64)
        shares.append(counts / counts.sum().clamp_min(1))
    same = all(torch.allclose(share, shares[0], rtol=1e-9, atol=0) for share in shares)
    return same and len({rule.mean for rule in rules}) == 1


def unknown_weights(batches: Sequence[Batch], reason: str) -> str:
    """What to say of batches whose weights cannot be found."""
    sizes = [count_samples(batch) for batch in batches[:8]]
    more = ", ..." if len(batches) > 8 else ""
    return (
        f"the batches ({describe(batches[0])} first) have {', '.join(map(str, sizes))}{more} "
        f"samples and a loss whose weights are unknown: {reason}. "
        'Pass weight=lambda batch: len(batch[1]), say, or weighting="batch-mean"'
    )
