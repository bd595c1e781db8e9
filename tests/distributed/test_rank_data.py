"""Data of sharded models that are read again for every product: the same, or all ranks say so."""

import copy

import problems
import pytest
import torch
import torch.distributed as dist
from processes import failures, on_ranks
from test_fully_sharded import pytestmark, relative, sharded  # noqa: F401  # where FSDP2 is missing
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from torchlinop import HessianOperator, options
from torchlinop.distributed.fully_sharded import FSDPHessianOperator
from torchlinop.testing.gallery import in_batches


class Augmented(Dataset):
    """Samples that are drawn anew on rank 1."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return torch.full((6,), float(i)).double() + dist.get_rank() * torch.randn(6), i % 3


class Passes(list):
    """Batches, of which later passes give others than the first: the slice ``later``."""

    later = slice(None)
    changed = False

    def __iter__(self):
        return iter(self[self.later] * 2 if self.changed else list.copy(self))


def hessian(data, **keywords):
    problem = problems.mlp()
    keywords = {"self_test": False, "pin_data": False} | keywords
    return FSDPHessianOperator(sharded(problem.model), data, problem.loss_fn, **keywords)


def mine():
    return problems.of_rank(problems.mlp(), dist.get_rank(), dist.get_world_size())


def augmented():
    hessian(DataLoader(Augmented(), 2))


def changed_afterwards(rank, later):
    """On one rank, passes after the construction give each batch of a slice twice."""
    data = Passes(mine())
    data.later = later
    A = hessian(data)
    data.changed = dist.get_rank() == rank
    A @ A.space.random(1)


def test_data_that_are_drawn_anew_on_one_rank_are_refused_by_all():
    here, there = failures(2, augmented)
    assert here == there
    assert here[0] == "NonDeterministicDataError"
    assert here[1].startswith("two passes over the data gave different objectives (")
    assert here[1].endswith("change between passes. Pass pin_data=True or shuffle=False")


@pytest.mark.parametrize(
    ("rank", "later", "sentence"),
    [
        (0, slice(0), "on rank 0 of 2: a pass over the data gave 0 samples, the first one 3"),
        (0, slice(1), "on rank 0 of 2: a pass over the data gave 6 samples, the first one 3"),
        (1, slice(1), "on rank 1 of 2: a pass over the data gave 6 samples, the first one 20"),
        (1, slice(7), "on rank 1 of 2: a pass over the data gave more than the 7 batches of the"),
    ],
)
def test_a_later_pass_with_more_or_fewer_batches_ends_all(rank, later, sentence):
    here, there = failures(2, changed_afterwards, rank, later)
    assert here == there
    assert here[0] == "NonDeterministicDataError"
    assert here[1].startswith(sentence)


class Counted(list):
    """Batches that know how often they were read."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def shuffled_and_counted():
    problem, ranks = problems.mlp(), range(dist.get_world_size())
    own = [torch.cat(parts) for parts in zip(*mine(), strict=True)]
    A = hessian(DataLoader(TensorDataset(*own), 3, shuffle=True))
    alone = HessianOperator(problem.model, problems.union(problem, len(ranks)), problem.loss_fn)
    v = alone.space.random(1)
    error = relative(A.space.gather(A @ A.space.scatter(v)), alone @ v)
    passes = []
    for checks in (True, False):
        data = Counted(mine())
        with options(checks=checks and dist.get_rank() == 0):  # one rank that asks is enough
            hessian(data)
        passes.append(data.passes)
    return error, passes[0] - passes[1]


def test_a_shuffled_loader_gives_the_matrix_of_all_data_and_without_checks_two_passes_are_saved():
    for error, saved in on_ranks(2, shuffled_and_counted):
        assert error <= 1e-14
        assert saved == 2


def with_dropout():
    """Against one process that has the batches of all ranks, one rank after the other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)).double()
    problem, ranks = problems.mlp(), dist.get_world_size()
    union = problems.union(problem, ranks)
    alone = HessianOperator(model, union, problem.loss_fn, mode="train", seed=5)
    A = FSDPHessianOperator(
        sharded(copy.deepcopy(model)), mine(), problem.loss_fn, mode="train", seed=5
    )
    v = alone.space.random(1)
    other = HessianOperator(model, union, problem.loss_fn, mode="train", seed=6)
    found = A.space.gather(A @ A.space.scatter(v))
    return relative(found, alone @ v), relative(other @ v, alone @ v)


def test_dropout_masks_are_those_of_one_process_with_all_batches():
    for error, of_other_masks in on_ranks(2, with_dropout):
        assert error <= 1e-14
        assert of_other_masks >= 0.1


def no_batch_is_left_out():
    data = in_batches(problems.mlp().full_batch, 3, 20)[dist.get_rank()]
    return repr(hessian([data], microbatch_size=2))


def test_the_operator_tells_samples_and_batches_of_all_ranks():
    for told in on_ranks(2, no_batch_is_left_out):
        assert "23 samples in 12 batches on 2 ranks, mean over samples" in told
