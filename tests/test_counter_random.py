import pytest
import torch
from scipy.stats import kstest

from torchlinop.counter_random import uniform

CPU = torch.device("cpu")


def draw(*shape, seed=0, stream=0, first=0):
    return uniform(torch.Size(shape), seed, stream, first, CPU)


def test_numbers_do_not_depend_on_the_batch():
    whole = draw(7, 3, 2)
    parts = torch.cat([draw(2, 3, 2), draw(5, 3, 2, first=2)])
    assert torch.equal(whole, parts)


def test_a_longer_sample_begins_with_the_numbers_of_a_shorter_one():
    assert torch.equal(draw(4, 9)[:, :5], draw(4, 5))


@pytest.mark.parametrize("other", [{"seed": 1}, {"stream": 1}, {"first": 1000}])
def test_other_keys_give_uncorrelated_numbers(other):
    a, b = draw(1000, 10).flatten() - 0.5, draw(1000, 10, **other).flatten() - 0.5
    assert abs((a * b).mean()) / (a.std() * b.std()) < 4 / 100  # 4 standard errors


def test_numbers_are_uniform_along_samples_and_along_entries():
    for numbers in (draw(20000, 1), draw(1, 20000), draw(200, 100)):
        assert kstest(numbers.flatten().numpy(), "uniform").pvalue > 1e-3


def test_neighbours_are_uncorrelated():
    numbers = draw(400, 50) - 0.5
    for a, b in [(numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1])]:
        correlation = (a * b).mean() / (a.std() * b.std())
        assert abs(correlation) < 4 / a.numel() ** 0.5


def test_numbers_lie_inside_the_open_interval():
    numbers = draw(300, 300)
    assert numbers.min() > 0
    assert numbers.max() < 1
