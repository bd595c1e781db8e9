"""Data of several processes as one: numbers that go on, fingerprints, rules found together."""

import threading
from dataclasses import dataclass

import pytest
import torch

from torchlinop import FisherOperator, HessianOperator
from torchlinop.fingerprint import fingerprint, signs
from torchlinop.ranks import ALONE
from torchlinop.testing import gallery
from torchlinop.testing.gallery import in_batches
from torchlinop.union import united


class _Meeting:
    """Where threads that stand for ranks leave what they have, and see that of all."""

    def __init__(self, size):
        self.left = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def gathered(self, number, mine):
        self.left[number] = mine
        self.barrier.wait()
        seen = list(self.left)
        self.barrier.wait()
        return seen


@dataclass(frozen=True)
class ThreadRanks:
    """Ranks in threads of this process."""

    meeting: _Meeting
    number: int
    name: str = "in threads"

    def agreed(self):
        return ALONE.agreed()

    def gathered(self, mine):
        return self.meeting.gathered(self.number, mine)

    def space(self, space, *, sums):
        return space

    def sum(self, compute, given):
        return torch.stack(self.gathered(compute())).sum(0)


def on_threads(size, work):
    meeting, results = _Meeting(size), [None] * size

    def run(number):
        results[number] = work(ThreadRanks(meeting, number))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_samples_and_batches_are_numbered_from_rank_to_rank():
    whole = in_batches(gallery.mlp().full_batch, 4, 3, 9, 7)

    # Threads share the global generator: models are made before they start.
    problems = [gallery.mlp(), gallery.mlp()]
    parts = [
        HessianOperator(p.model, mine, p.loss_fn).objective
        for p, mine in zip(problems, [whole[:2], whole[2:]], strict=True)
    ]

    def numbers(ranks):
        data = united(parts[ranks.number], ranks).data
        return data.starts, data.before.batches, data.whole, [share for _, share in data]

    first, second = on_threads(2, numbers)
    assert (first[:2], second[:2]) == (((0, 4), 0), ((7, 16), 2))
    assert first[2] == second[2]
    assert (first[2].samples, first[2].batches) == (23, 4)
    assert first[3] + second[3] == [4 / 23, 3 / 23, 9 / 23, 7 / 23]


@pytest.mark.parametrize("kind", [HessianOperator, FisherOperator])
def test_products_of_threads_are_those_of_one_process(kind):
    whole = in_batches(gallery.mlp().full_batch, 2, 9, 12)

    def built(batches):
        p = gallery.mlp()
        if kind is HessianOperator:
            return kind(p.model, batches, p.loss_fn)
        return kind(p.model, batches, p.forward_fn, p.criterion, mc_samples=2)

    parts = [built([batch]) for batch in whole]

    def product(ranks):
        op = parts[ranks.number]
        op.unite(ranks)
        return op @ op.space.random(2)

    alone = built(whole)
    expected = alone @ alone.space.random(2)
    for AV in on_threads(3, product):
        assert (AV - expected).abs().max() <= 1e-15


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_a_fingerprint_changes_with_every_bit_place_and_sign(dtype):
    x = (torch.arange(64).reshape(32, 2) - 20).to(dtype)
    others = [-x, x.flip(0), x.roll(1, 1), x + (torch.arange(64).view(32, 2) == 63).to(dtype)]
    numbers = [int(fingerprint(y)) for y in (x, *others)]
    assert len(set(numbers)) == 5
    assert int(fingerprint(x.mT.contiguous().mT)) == numbers[0]  # whatever the strides


def test_a_fingerprint_leaves_the_tensor_as_it_was():
    x = torch.arange(10)
    fingerprint(x)
    assert torch.equal(x, torch.arange(10))


def test_signs_are_the_lower_bits():
    assert signs(torch.tensor(0b1011), 5).tolist() == [1, 1, -1, 1, -1]
