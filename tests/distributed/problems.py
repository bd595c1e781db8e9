"""Problems whose samples are dealt to ranks, unevenly and in ragged batches, and their union."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from torchlinop.testing import gallery
from torchlinop.testing.gallery import Problem, in_batches


def mlp() -> Problem:
    """Classification of 23 samples (n = 53)."""
    return gallery.mlp()


def regression() -> Problem:
    """Two real targets for each of 11 samples (n = 23)."""
    return gallery.regression()


def tied() -> Problem:
    """An embedding that is also the output layer, 7 samples."""
    return gallery.tied()


def frozen() -> Problem:
    """Three layers, of which the bias of the first and the weight of the second are frozen."""
    torch.manual_seed(11)
    model = nn.Sequential(
        nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)
    ).double()
    model[0].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    full = (torch.randn(23, 6).double(), torch.randint(0, 3, (23,)))
    return Problem(model, in_batches(full, 9, 9, 5), gallery.cross_entropy, full)


def gpt2() -> Problem:
    """Tied head, padded rows: every one of 6 samples has another number of labels."""
    return gallery.gpt2()


def llama() -> Problem:
    """SiLU, rotary positions, padded rows."""
    return gallery.llama()


PROBLEMS: dict[str, Callable[[], Problem]] = {
    made.__name__: made for made in (mlp, regression, tied, frozen, gpt2, llama)
}

# How many samples the ranks have, in proportion: the first world_size numbers.
EVEN = (1, 1, 1, 1)
UNEQUAL = (1, 5, 2, 3)

_LARGEST = 3  # samples in a batch; the last batch of a rank is smaller


def of_rank(
    problem: Problem, rank: int, world_size: int, proportions: tuple[int, ...] = UNEQUAL
) -> list[Any]:
    """The batches that this rank has: consecutive samples, at least one."""
    samples = _samples(problem)
    shares = _shares(samples, proportions[:world_size])
    start = sum(shares[:rank])
    number = shares[rank]
    sizes = [_LARGEST] * (number // _LARGEST) + [number % _LARGEST] * bool(number % _LARGEST)
    whole = in_batches(problem.full_batch, start, number, samples - start - number)[1]
    return in_batches(whole, *sizes)


def union(problem: Problem, world_size: int, proportions: tuple[int, ...] = UNEQUAL) -> list[Any]:
    """The batches of all ranks, one rank after another: what a single process would have."""
    ranks = range(world_size)
    return [batch for r in ranks for batch in of_rank(problem, r, world_size, proportions)]


def _samples(problem: Problem) -> int:
    full = problem.full_batch
    return len(full["input_ids"] if isinstance(full, dict) else full[0])


def _shares(samples: int, proportions: tuple[int, ...]) -> list[int]:
    """At least one each, and all together."""
    total = sum(proportions)
    shares = [max(1, samples * p // total) for p in proportions]
    shares[-1] += samples - sum(shares)
    return shares
