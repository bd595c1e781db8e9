"""Products of tensor-parallel models: those of one process, with data parallelism around or not."""

from __future__ import annotations

import copy
from typing import Any

import problems
import torch
import torch.distributed as dist
from processes import on_ranks
from test_fully_sharded import MATRICES, refused, relative
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor._api import _FromTorchTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from torchlinop.distributed import mended_autograd
from torchlinop.distributed.fully_sharded import FSDPHessianOperator
from torchlinop.testing import gallery


def even() -> gallery.Problem:
    """Layers of even sizes (a plan by column, then by row, knows no others); one bias frozen."""
    torch.manual_seed(5)
    layers = [nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)]
    model = nn.Sequential(*layers, nn.LayerNorm(4), nn.Linear(4, 3)).double()
    model[2].bias.requires_grad_(False)
    full = (torch.randn(13, 6).double(), torch.randint(0, 3, (13,)))
    return gallery.Problem(model, [], gallery.cross_entropy, full)


PROBLEMS = {"even": even, "llama": problems.llama}

PLANS = {
    "even": {"2": ColwiseParallel, "4": RowwiseParallel},
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
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    parallelize_module(model, mesh, plan)
    for bias in frozen:  # which torch 2.6 has forgotten
        model.get_parameter(bias).requires_grad_(False)
    return model


def errors(names: list[str], matrices: list[str], replicas: int = 1, **options: Any) -> dict:
    """‖A v − reference‖ / ‖reference‖, its estimate, and the method, by problem and matrix."""
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
            found[f"{name} {matrix}"] = (
                relative(AV, reference @ V),
                A.error_estimate,
                A.method,
            )
    return found


def refusals() -> list[tuple[str, tuple[str, str]]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    problem = even()
    model = parallel("even", problem.model, mesh["tp"])
    data = [problem.full_batch]

    def attempt(**options: Any) -> tuple[str, str]:
        return refused(FSDPHessianOperator, model, data, problem.loss_fn, **options)

    forward = attempt(method="forward_over_reverse", data_group=mesh["dp"].get_group())
    unmended = mended_autograd._from_local_backward
    mended_autograd._from_local_backward = _FromTorchTensor.backward
    silent = attempt(data_group=mesh["dp"].get_group())
    mended_autograd._from_local_backward = unmended
    own = problems.of_rank(problem, mesh["dp"].get_local_rank(), 2)  # of "dp", given to "tp"
    mixed = refused(
        FSDPHessianOperator, model, own, problem.loss_fn, data_group=mesh["tp"].get_group()
    )
    return [
        ('pass data_group=mesh["dp"].get_group()', attempt()),
        ('use method="autograd" for a tensor-parallel model', forward),
        ("the product by autograd differs by", silent),
        ("ranks 0 and 2 have parts of the same copy of the model, and different", mixed),
    ]


def on_four() -> tuple[dict, list]:
    found = errors(["even"], ["hessian", "ggn"], replicas=2)
    found |= errors(["llama"], ["hessian"], replicas=2)
    alone = errors(["even"], ["hessian", "ggn"])
    return found | {f"{name}, alone": result for name, result in alone.items()}, refusals()


def test_with_data_parallelism_around_and_what_cannot_be_had():
    for found, refusals in on_ranks(4, on_four, timeout=120):
        assert max(error for error, *_ in found.values()) <= 1e-14, found
        for expected, (kind, message) in refusals:
            assert expected in message, (expected, kind, message)


def test_products_by_double_backward_are_those_of_one_process():
    names, matrices = ["even", "llama"], ["hessian", "ggn", "empirical fisher"]
    for found in on_ranks(2, errors, names, matrices):
        assert {method for *_, method in found.values()} == {"autograd"}
        assert max(error for error, *_ in found.values()) <= 1e-14, found
