"""Ranks that hold the same part of a model hold the same numbers, or all of them are told."""

import copy

import problems
import pytest
import torch
import torch.distributed as dist
from processes import failures, on_ranks
from test_fully_sharded import pytestmark, sharded  # noqa: F401
from test_tensor_parallel import even, parallel
from torch.distributed.device_mesh import init_device_mesh

from torchlinop import lanczos
from torchlinop.distributed.fully_sharded import FSDPHessianOperator


def hybrid(rank, what):
    """Two replicas, of which one rank has something else."""
    problem = problems.frozen()
    problem.model.register_buffer("seen", torch.arange(3.0))
    model = sharded(copy.deepcopy(problem.model), 2)
    if dist.get_rank() == rank:
        of_rank = dict([*model.named_parameters(), *model.named_buffers()])[what].detach()
        (of_rank.to_local() if hasattr(of_rank, "to_local") else of_rank).view(-1)[0] += 1e-9
    data = problems.of_rank(problem, dist.get_rank(), dist.get_world_size())
    A = FSDPHessianOperator(model, data, problem.loss_fn, self_test=False)
    A @ A.space.random(1)


@pytest.mark.parametrize(
    ("rank", "what", "ranks"),
    [
        (1, "4.weight", "0 and 1"),
        (0, "0.bias", "0 and 1"),  # frozen
    ],
)
def test_replicas_with_other_parameters_are_refused_by_all(rank, what, ranks):
    here, there = failures(2, hybrid, rank, what)
    assert here == there
    assert here[0] == "ProcessGroupError"
    assert here[1].startswith(f"the ranks hold different values of {what} (ranks {ranks}), where")
    assert here[1].endswith("(torch.distributed.broadcast), before the operator is built")


def test_of_two_replicas_in_shards_the_ranks_of_the_same_shard_are_named():
    told = failures(4, hybrid, 3, "4.weight")
    assert set(told) == {told[0]}
    assert told[0][1].startswith("the ranks hold different values of 4.weight (ranks 1 and 3)")


def test_buffers_have_to_be_the_same_on_all_ranks():
    told = failures(2, hybrid, 1, "seen")
    assert set(told) == {told[0]}
    assert told[0][1].startswith("the ranks hold different values of seen (ranks 0 and 1)")


def started_differently(seeds):
    """Each rank draws its own part of a start, as its random numbers come."""
    problem = problems.mlp()
    data = problems.of_rank(problem, dist.get_rank(), dist.get_world_size())
    A = FSDPHessianOperator(sharded(problem.model, 2), data, problem.loss_fn, self_test=False)
    torch.manual_seed(seeds[dist.get_rank()])
    lanczos(A, 2, v0=torch.randn(A.space.local_size).double())


def test_replicas_that_pass_different_vectors_are_all_told_so():
    told = failures(4, started_differently, [0, 1, 0, 2])
    assert set(told) == {told[0]}
    assert told[0][0] == "DivergenceError"
    assert told[0][1].startswith("the ranks passed different vectors to a product")
    assert failures(4, started_differently, [0, 1, 0, 1]) == [None] * 4


def tensor_parallel(seed_of_rank, moved):
    """A model whose layers without a plan are drawn by each rank for itself, then a bit moved."""
    problem = even()
    torch.manual_seed(seed_of_rank[dist.get_rank()])
    problem.model[0].reset_parameters()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = parallel("even", problem.model, mesh)
    with torch.no_grad():
        model[0].weight += moved * dist.get_rank()
    FSDPHessianOperator(model, [problem.full_batch], problem.loss_fn, self_test=False)


def test_layers_that_tensor_parallel_ranks_have_drawn_for_themselves_are_refused():
    told = failures(2, tensor_parallel, [0, 1], 0.0)
    assert set(told) == {told[0]}
    assert told[0][1].startswith("the ranks hold different values of 0.weight (ranks 0 and 1)")


def test_rounding_of_what_tensor_parallel_ranks_have_trained_apart_is_allowed():
    assert on_ranks(2, tensor_parallel, [0, 0], 1e-9) == [None, None]
