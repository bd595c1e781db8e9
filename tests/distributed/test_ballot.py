"""Ranks see from a sum in any dtype whether all of them have the same."""

import pytest
import torch

from torchlinop.distributed.ballot import BITS, Ballot
from torchlinop.fingerprint import fingerprint


def elected(fingerprints, dtype):
    """What the first rank finds, and the numbers it takes; every sum is rounded to the dtype."""
    ballots = [Ballot(rank, len(fingerprints), dtype) for rank in range(len(fingerprints))]
    total = torch.zeros(ballots[0].size, dtype=dtype)
    for ballot, number in zip(ballots, fingerprints, strict=True):
        numbers = torch.zeros(ballot.size, dtype=dtype)
        ballot.vote(number, numbers)
        total += numbers
    return ballots[0].unanimous(total.tolist()), ballots[0].size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("ranks", [1, 2, 256, 257, 1000, 2500])
def test_any_number_of_ranks_with_the_same_vector_agree_and_one_other_is_seen(ranks, dtype):
    same, other = fingerprint(torch.ones(5)), fingerprint(torch.zeros(5))
    assert elected([same] * ranks, dtype)[0]
    for odd in {0, ranks // 2, ranks - 1} if ranks > 1 else ():
        numbers = [same] * ranks
        numbers[odd] = other
        assert not elected(numbers, dtype)[0]


def test_few_ranks_need_one_number_a_bit():
    assert Ballot(0, 256, torch.bfloat16).size == BITS
    assert Ballot(0, 257, torch.bfloat16).size == 2 * BITS
    assert Ballot(0, 10**6, torch.float32).size == BITS


def test_halves_of_the_ranks_that_differ_are_seen():
    ones, zeros = fingerprint(torch.ones(5)), fingerprint(torch.zeros(5))
    assert not elected([ones] * 256 + [zeros] * 256, torch.bfloat16)[0]
