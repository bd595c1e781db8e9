"""Finite differences on shards: within the error they report, for any v, and nothing left moved."""

from __future__ import annotations

import copy
import math
from typing import Any

import problems
import pytest
import torch
import torch.distributed as dist
from processes import on_ranks
from test_fully_sharded import MATRICES, pytestmark, relative, same, sharded, states  # noqa: F401
from test_tensor_parallel import errors as tensor_parallel_errors
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from torchlinop import HessianOperator
from torchlinop.distributed.fully_sharded import FSDPHessianOperator
from torchlinop.errors import NonFiniteError
from torchlinop.testing import gallery


class Square(torch.autograd.Function):
    """x², with a backward pass and no forward rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(x)


def differences() -> dict[str, Any]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {}
    for name, matrix in [("mlp", "hessian"), ("mlp", "ggn"), ("gpt2", "hessian")]:
        problem = problems.PROBLEMS[name]()
        build, single, ours = MATRICES[matrix]
        own, union = problems.of_rank(problem, rank, ranks), problems.union(problem, ranks)
        reference = build(problem, problem.model, union, single)
        model = sharded(copy.deepcopy(problem.model))
        before = states(model)
        A = build(problem, model, own, ours, method="finite_difference")
        V = reference.space.random(2, seed=3)
        local = A.objective.layout.scatter(V)
        AV = A @ local
        found[f"{name} {matrix}"] = relative(A.objective.layout.gather(AV), reference @ V)
        found[f"{name} {matrix} estimate"] = A.error_estimate
        found[f"{name} {matrix} given back"] = same(before, states(model))
        none, large = (A @ torch.stack([0 * local[:, 0], 2.0**600 * local[:, 0]], 1)).unbind(1)
        far = A.objective.space.norm(large / 2.0**600 - AV[:, 0])
        found[f"{name} {matrix} scaled"] = not none.any() and bool(far <= 1e-7)
    plain = gallery.mlp()
    model = nn.Sequential(plain.model[0], Squares(), plain.model[2])
    problem = gallery.Problem(model, plain.batches, plain.loss_fn, plain.full_batch)
    own, union = problems.of_rank(problem, rank, ranks), problems.union(problem, ranks)
    reference = HessianOperator(copy.deepcopy(model), union, problem.loss_fn)
    A = FSDPHessianOperator(sharded(model), own, problem.loss_fn)
    v = reference.space.random(1, seed=3)[:, 0]
    Av = A.objective.layout.gather(A @ A.objective.layout.scatter(v))
    found["no rule"] = relative(Av, reference @ v)
    found["no rule estimate"] = A.error_estimate
    found["no rule said"] = "jvp" in repr(A)
    return found


def test_differences_are_within_the_error_they_report():
    for found in on_ranks(2, differences, timeout=120):
        for name in [name for name in found if f"{name} estimate" in found]:
            estimate = found.pop(f"{name} estimate")
            assert found.pop(name) <= estimate <= 1e-7, name
        assert set(found.values()) == {True}, found


def at_zero() -> tuple[float, float]:
    plain = gallery.mlp()
    model = nn.Sequential(nn.Flatten(), copy.deepcopy(plain.model[0]))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    reference = HessianOperator(copy.deepcopy(model), plain.batches, plain.loss_fn)
    model = fully_shard(model)
    A = FSDPHessianOperator(model, plain.batches, plain.loss_fn, method="finite_difference")
    V = reference.space.random(2, seed=3)
    return relative(A @ V, reference @ V), A.error_estimate


def test_differences_around_zero_have_a_step_too():
    [(error, estimate)] = on_ranks(1, at_zero)
    assert error <= estimate <= 1e-6


def test_parameters_that_are_sharded_twice_are_differentiated_by_differences():
    """FSDP2 of tensor-parallel parameters, for which torch has no exact way."""
    for found in on_ranks(4, tensor_parallel_errors, ["even"], ["hessian", "ggn"], 2, fully=True):
        for error, estimate, method in found.values():
            assert error <= estimate <= 1e-8
            assert method.startswith("finite_difference, relative step")


def beside_a_wall() -> tuple[str, str, bool]:
    """A loss that is a number at the parameters alone, and one that is so up to the usual step."""
    plain = gallery.mlp()

    def loss_fn(model: nn.Module, batch: Any, far: float = 0.0) -> Tensor:
        outputs = model(batch[0])
        with torch.no_grad():
            moved = (outputs.detach() - plain.model(batch[0])).abs().max()
        inside = bool(moved <= max(far, 1e-13))
        return nn.functional.cross_entropy(outputs, batch[1]) * (1.0 if inside else math.nan)

    def narrow(model: nn.Module, batch: Any) -> Tensor:
        return loss_fn(model, batch, 3e-6)

    model = sharded(copy.deepcopy(plain.model))
    with pytest.raises(NonFiniteError) as refused:
        FSDPHessianOperator(model, plain.batches, loss_fn)
    A = FSDPHessianOperator(model, plain.batches, loss_fn, self_test=False)
    finite = bool(torch.isfinite(A @ A.space.random(1)).all())
    return str(refused.value), FSDPHessianOperator(model, plain.batches, narrow).method, finite


def test_where_differences_are_not_finite_the_exact_product_is_not_blamed():
    for sentence, method, finite in on_ranks(2, beside_a_wall):
        assert sentence.startswith("the product by forward_over_reverse is finite, but gradients")
        assert sentence.endswith("self_test=False goes without this comparison")
        assert method == "forward_over_reverse"
        assert finite
