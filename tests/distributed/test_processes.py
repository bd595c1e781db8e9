"""The harness of these tests: results in the order of the ranks, errors and deaths told."""

import os
import signal

import pytest
import torch
import torch.distributed as dist
from processes import RankDiedError, RankFailedError, failures, on_ranks


def summed(x: float) -> float:
    total = torch.tensor(x + dist.get_rank())
    dist.all_reduce(total)
    return float(total)


def raises_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"of rank {rank}")


def killed(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_gives_its_result(world_size):
    expected = world_size * 1.5 + world_size * (world_size - 1) / 2
    assert on_ranks(world_size, summed, 1.5) == [expected] * world_size


def test_an_error_on_one_rank_is_told_with_its_rank():
    with pytest.raises(RankFailedError, match="rank 1: ValueError: of rank 1"):
        on_ranks(2, raises_on, 1)
    assert failures(2, raises_on, 0) == [("ValueError", "of rank 0"), None]


def test_a_rank_that_dies_is_named():
    with pytest.raises(RankDiedError, match=r"no answer from ranks \[1\]"):
        on_ranks(2, killed, 1)
