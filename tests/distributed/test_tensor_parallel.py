"""Products of tensor-parallel models: those of one process, with data parallelism around or not."""

from __future__ import annotations

import copy
from typing import Any

import problems
import pytest
import torch
import torch.distributed as dist
from processes import on_ranks
from test_fully_sharded import MATRICES, relative
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from torchlinop.errors import OptionError
from torchlinop.testing import gallery



def even() -> gallery.Problem:
    """Layers of even sizes (a plan by column, then by row, knows no others); one bias frozen."""
    torch.manual_seed(5)
    layers = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 3)
    model = nn.Sequential(*layers).double()
    model[0].bias.requires_grad_(False)
    full = (torch.randn(13, 6).double(), torch.randint(0, 3, (13,)))
    return gallery.Problem(model, [], gallery.cross_entropy, full)


PROBLEMS = {"even": even, "llama": problems.llama}

PLANS = {
    "even": {"0": ColwiseParallel, "2": RowwiseParallel},
    "llama": {
        f"model.layers.{layer}.mlp.{name}": style
        for layer in (0, 1)
        for name, style in [
            ("gate_proj", ColwiseParallel),
            ("up_proj", ColwiseParallel),
            ("down_proj", RowwiseParallel),
        ]
    },
}


def parallel(name: str, model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """By column, then by row; the vocabulary of a language model by column, gathered at once."""
    plan = {layer: style() for layer, style in PLANS[name].items()}
    if name == "llama":
        plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    return parallelize_module(model, mesh, plan)


def errors(names: list[str], matrices: list[str], replicas: int = 1, **options: Any) -> dict:
    """‖A v − reference‖ / ‖reference‖, and the method, for each problem and matrix."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (replicas, ranks // replicas), mesh_dim_names=("dp", "tp"))
    data = {"data_group": mesh["dp"].get_group()} if replicas > 1 else {}
    found = {}
    for name in names:
        problem = PROBLEMS[name]()
        model = parallel(name, copy.deepcopy(problem.model), mesh["tp"])
        if options.get("fully"):
            fully_shard(model, mesh=mesh["dp"])
            data = {}
        own = problems.of_rank(problem, mesh["dp"].get_local_rank(), replicas)
        union = problems.union(problem, replicas)
        for matrix in matrices:
            build, single, ours = MATRICES[matrix]
            reference = build(problem, problem.model, union, single)
            A = build(problem, model, own, ours, **data)
            V = reference.space.random(2, seed=3)
            AV = A.objective.layout.gather(A @ A.objective.layout.scatter(V))
            found[f"{name} {matrix}"] = (relative(AV, reference @ V), A.method)
    return found


@pytest.mark.parametrize("ranks, replicas", [(2, 1), (4, 2)])
def test_products_by_double_backward_are_those_of_one_process(ranks, replicas):
    names, matrices = ["even", "llama"], ["hessian", "ggn"]
    for found in on_ranks(ranks, errors, names, matrices, replicas):
        assert {method for _, method in found.values()} == {"autograd"}
        assert max(error for error, _ in found.values()) <= 1e-14, found
