"""Products of models under FSDP2 and HSDP: those of one process on the union of all data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import problems
import pytest
import torch
import torch.distributed as dist
from processes import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from torchlinop import EmpiricalFisherOperator, GGNOperator, HessianOperator
from torchlinop.distributed.fully_sharded import (
    FSDPEmpiricalFisherOperator,
    FSDPGGNOperator,
    FSDPHessianOperator,
)

Problem = Any


def sharded(model: nn.Module, replicas: int = 1, **options: Any) -> nn.Module:
    """Every block, and the rest, under ``fully_shard``; replicas make it HSDP."""
    ranks = dist.get_world_size()
    shape = (replicas, ranks // replicas) if replicas > 1 else (ranks,)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard")[-len(shape) :])
    for part in blocks(model):
        fully_shard(part, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def blocks(model: nn.Module) -> list[nn.Module]:
    kinds = ("GPT2Block", "LlamaDecoderLayer", "Linear")
    large = [m for m in model.modules() if type(m).__name__ in kinds[:2]]
    layers = [m for m in model if list(m.parameters())] if isinstance(model, nn.Sequential) else []
    return large or layers


def hessian(problem: Problem, model: nn.Module, data: list, kind: Callable, **options: Any) -> Any:
    return kind(model, data, problem.loss_fn, **options)


def by_outputs(
    problem: Problem, model: nn.Module, data: list, kind: Callable, **options: Any
) -> Any:
    return kind(model, data, problem.forward_fn, problem.criterion, **options)


MATRICES = {
    "hessian": (hessian, HessianOperator, FSDPHessianOperator),
    "ggn": (by_outputs, GGNOperator, FSDPGGNOperator),
    "empirical fisher": (by_outputs, EmpiricalFisherOperator, FSDPEmpiricalFisherOperator),
    "of losses": (hessian, EmpiricalFisherOperator, FSDPEmpiricalFisherOperator),
}


def errors(names: list[str], matrices: list[str], replicas: int = 1) -> dict[str, float]:
    """‖A v − reference‖ / ‖reference‖ for each problem and matrix."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found = {}
    for name in names:
        problem = problems.PROBLEMS[name]()
        model = sharded(copy.deepcopy(problem.model), replicas)
        own, union = problems.of_rank(problem, rank, ranks), problems.union(problem, ranks)
        for matrix in matrices:
            build, single, ours = MATRICES[matrix]
            reference = build(problem, problem.model, union, single)
            A = build(problem, model, own, ours)
            V = reference.space.random(2, seed=3)
            AV = A.objective.layout.gather(A @ A.objective.layout.scatter(V))
            found[f"{name} {matrix}"] = relative(AV, reference @ V)
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("ranks", [2, 4])
def test_products_are_those_of_one_process_on_the_union_of_the_data(ranks):
    names = ["mlp", "frozen", "tied", "regression"]
    for found in on_ranks(ranks, errors, names, ["hessian", "ggn", "empirical fisher", "of losses"]):
        assert max(found.values()) <= 1e-14, found
