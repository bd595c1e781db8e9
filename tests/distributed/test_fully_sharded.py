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
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from torchlinop import EmpiricalFisherOperator, GGNOperator, HessianOperator, match_names
from torchlinop.distributed import fsdp_groups
from torchlinop.distributed import tangents as tangents_module
from torchlinop.distributed.fully_sharded import (
    FSDPEmpiricalFisherOperator,
    FSDPGGNOperator,
    FSDPHessianOperator,
)
from torchlinop.errors import ProcessGroupError
from torchlinop.testing import gallery

Problem = Any

# Streams that FSDP2 asks for are missing on CPUs in torch 2.6.
pytestmark = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="no FSDP2 on the CPU"
)


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
            A = build(problem, model, own, ours, self_test=matrix == "hessian")
            V = reference.space.random(2, seed=3)
            AV = A.objective.layout.gather(A @ A.objective.layout.scatter(V))
            found[f"{name} {matrix}"] = relative(AV, reference @ V)
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def on_two() -> dict[str, float]:
    every = errors(list(problems.PROBLEMS), ["hessian", "ggn", "empirical fisher"])
    return every | errors(["mlp", "regression"], ["of losses"])


def test_products_are_those_of_one_process_on_the_union_of_the_data():
    for found in on_ranks(2, on_two, timeout=120):
        assert max(found.values()) <= 1e-14, found


def on_four() -> dict[str, float]:
    plain = errors(["mlp", "frozen"], ["hessian", "ggn"])
    hybrid = errors(["mlp"], ["hessian", "ggn"], 2) | errors(["gpt2"], ["hessian"], 2)
    return plain | {f"hybrid {name}": error for name, error in hybrid.items()}


def test_they_are_on_four_ranks_and_with_replicas():
    for found in on_ranks(4, on_four, timeout=120):
        assert max(found.values()) <= 1e-14, found


def variants() -> dict[str, float]:
    """Errors of what users do to a model under ``fully_shard``."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found = {}

    def compared(label: str, problem: Problem, model: nn.Module, **options: Any) -> Any:
        own, union = problems.of_rank(problem, rank, ranks), problems.union(problem, ranks)
        reference = HessianOperator(problem.model, union, problem.loss_fn, **options)
        A = FSDPHessianOperator(model, own, problem.loss_fn, **options)
        v = reference.space.random(1, seed=3)[:, 0].to(reference.dtype)
        Av = A.objective.layout.gather(A @ A.objective.layout.scatter(v))
        found[label] = relative(Av, reference @ v)
        return A

    mlp, gpt2 = problems.mlp(), problems.gpt2()
    inside = gallery.checkpointed()
    compared("checkpoint in a part", inside, sharded(copy.deepcopy(inside.model)))
    wrapped = copy.deepcopy(mlp.model)
    wrapped[0] = checkpoint_wrapper(wrapped[0])
    compared("checkpoint around a part", mlp, sharded(wrapped))
    around = copy.deepcopy(gpt2.model)
    around.gradient_checkpointing_enable()
    compared("checkpoint of a library", gpt2, sharded(around))

    compared("filter", mlp, sharded(copy.deepcopy(mlp.model)), param_filter=match_names("2.*"))
    compared("microbatches", mlp, sharded(copy.deepcopy(mlp.model)), microbatch_size=1)
    compared("read again", mlp, sharded(copy.deepcopy(mlp.model)), pin_data=False)
    compared("one group", mlp, fully_shard(copy.deepcopy(mlp.model)))
    columns = {"shard_placement_fn": lambda p: Shard(p.ndim - 1)}
    square = gallery.Problem(
        nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4)).double(),
        mlp.batches,
        mlp.loss_fn,
        (torch.randn(9, 6).double(), torch.randint(0, 4, (9,))),
    )
    compared("by columns", square, sharded(copy.deepcopy(square.model), **columns))
    single = gallery.mlp(torch.float32)
    compared("float32", single, sharded(copy.deepcopy(single.model)))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    compared("bfloat16", single, sharded(copy.deepcopy(single.model), mp_policy=half))
    return found


def test_they_are_whatever_users_do_to_the_model():
    for found in on_ranks(2, variants, timeout=120):
        coarse = {"float32": 1e-6, "bfloat16": 0.03}
        assert not {k: e for k, e in found.items() if not e <= coarse.get(k, 1e-14)}, found


def states(model: nn.Module) -> list[Any]:
    """All that users can see of a model."""
    seen: list[Any] = []
    for name, p in model.named_parameters():
        seen += [name, id(p), type(p.data), p.requires_grad, p.detach().to_local().clone()]
        seen += [None if p.grad is None else p.grad.to_local().clone()]
    seen += [buffer.clone() for buffer in model.buffers()]
    for module in model.modules():
        seen += [module.training, [*module._forward_hooks], [*module._forward_pre_hooks]]
    return seen


def same(a: list[Any], b: list[Any]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


class Faulty:
    """A loss that fails when told to: after the forward pass, or in the backward pass."""

    def __init__(self, loss: Callable) -> None:
        self.loss = loss
        self.fails = ""

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        hook = None
        if self.fails == "backward":
            last = list(model.children())[-1]
            hook = last.register_forward_hook(self._raise_behind)
        value = self.loss(model, batch)
        if hook is not None:
            hook.remove()
        if self.fails == "forward" and dist.get_rank() == 1:
            self._raise(None)
        return value

    def _raise_behind(self, module: nn.Module, inputs: Any, outputs: Tensor) -> None:
        outputs.register_hook(self._raise)

    def _raise(self, gradient: Tensor | None) -> None:
        raise ArithmeticError(f"no {self.fails}")


def treatment(replicas: int = 1) -> dict[str, Any]:
    """What becomes of a model that is in use: with gradients, hooks, buffers, in train mode."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    problem = problems.mlp()
    problem.model.register_buffer("seen", torch.arange(3.0))
    problem.model.train()
    model = sharded(copy.deepcopy(problem.model), replicas)
    own, union = problems.of_rank(problem, rank, ranks), problems.union(problem, ranks)
    model[0].register_forward_hook(lambda module, inputs, output: None)
    problem.loss_fn(model, own[0]).backward()
    loss = Faulty(problem.loss_fn)
    reference = HessianOperator(problem.model, union, problem.loss_fn)
    v = reference.space.random(1)[:, 0]
    before = states(model)
    with torch.no_grad():
        model(own[0][0])  # leaves the outermost group gathered
    found: dict[str, Any] = {}
    A = FSDPHessianOperator(model, own, loss)
    local = A.objective.layout.scatter(v)
    A @ local
    A.gradient()
    found["product"] = same(before, states(model))
    for place in ("forward", "backward"):
        loss.fails = place
        try:
            A @ local
        except ArithmeticError as error:
            found[f"error in {place}"] = str(error)
        loss.fails = ""
        found[f"healed in {place}"] = same(before, states(model))
        model.zero_grad()
        problem.loss_fn(model, own[0]).backward()
        found[f"gradient after {place}"] = same(before, states(model))
    found["product after all"] = relative(A.objective.layout.gather(A @ local), reference @ v)
    with torch.no_grad():  # the user trains on: the matrix stays that of the construction
        for p in model.parameters():
            p.mul_(1.5)
    moved = states(model)
    found["while training"] = relative(A.objective.layout.gather(A @ local), reference @ v)
    found["training goes on"] = same(moved, states(model))
    found["gradient"] = relative(A.objective.layout.gather(A.gradient()), reference.gradient())
    found["loss"] = abs(float(A.loss()) - float(reference.loss()))
    return found


def test_the_model_is_given_back_bit_by_bit_also_after_exceptions():
    for found in on_ranks(2, treatment):
        assert found.pop("error in forward") == "on rank 1 of 2: no forward"
        assert found.pop("error in backward") == "no backward"
        for name in ("product after all", "while training", "gradient", "loss"):
            assert found.pop(name) <= 1e-14, name
        assert set(found.values()) == {True}, found


def refused(function: Callable, *args: Any, **options: Any) -> tuple[str, str]:
    try:
        function(*args, **options)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", "was refused"


def faulty_filter(name: str, parameter: nn.Parameter) -> bool:
    if dist.get_rank() == 1:
        raise LookupError("no such filter")
    return True


class Torn(list):
    """Data of which the last batch cannot be read on rank 1, when told so."""

    torn = False

    def __iter__(self) -> Any:
        yield from self[:-1]
        if self.torn and dist.get_rank() == 1:
            raise OSError("no such disk")
        yield self[-1]


def refusals() -> list[tuple[str, tuple[str, str]]]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    problem = problems.mlp()
    loss, own = problem.loss_fn, problems.of_rank(problem, rank, ranks)

    def attempt(model: nn.Module, data: Any = own, f: Callable = loss, **options: Any) -> Any:
        return refused(FSDPHessianOperator, model, data, f, **options)

    def fresh(**options: Any) -> nn.Module:
        return sharded(copy.deepcopy(problem.model), **options)

    found = [("no parameter of this Sequential is sharded", attempt(problem.model))]
    part = copy.deepcopy(problem.model)
    fully_shard(part[0])
    found.append(("call fully_shard(model) too", attempt(part)))
    first = FullyShardedDataParallel(copy.deepcopy(problem.model), device_id=torch.device("cpu"))
    found.append(("wrap the model by torch.distributed.fsdp.fully_shard", attempt(first)))
    model = fresh()
    found.append(("so that gradients cannot be differentiated", attempt(model, method="autograd")))
    found.append(("unknown method 'exact'", attempt(model, method="exact")))
    found.append(("unknown option 'metod'", attempt(model, metod="auto")))
    found.append(("data_group is for tensor-parallel", attempt(model, data_group=dist.group.WORLD)))
    found.append(("positive fd_step", attempt(model, method="finite_difference", fd_step=-1.0)))
    found.append(
        ("on rank 1 of 2: the data gave no batches", attempt(model, own if rank == 0 else []))
    )
    mean = lambda model, batch: loss(model, batch) * (1 // rank)  # noqa: E731
    found.append(
        (
            "on rank 0 of 2: integer division or modulo by zero",
            attempt(model, own, mean, weighting="batch-mean"),
        )
    )
    found.append(("on rank 0 of 2: integer division or modulo by zero", attempt(model, own, mean)))
    other = {"weight": lambda batch: 1.0} if rank else {}
    found.append(("differently, by measurement and weights; pass", attempt(model, **other)))
    found.append(
        (
            "the ranks differ in self_test: True on rank 0, False on rank 1; build",
            attempt(model, self_test=rank == 0),
        )
    )
    found.append(("on rank 1 of 2: no such filter", attempt(model, param_filter=faulty_filter)))
    data = Torn(own)
    C = FSDPHessianOperator(model, data, loss, self_test=False, pin_data=False)
    data.torn = True
    found.append(("on rank 1 of 2: no such disk", refused(C.matvec, C.space.random(1)[:, 0])))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    coarse = fresh(mp_policy=half)
    found.append(
        ("float32 at least, got torch.bfloat16", attempt(coarse, method="finite_difference"))
    )
    A = FSDPHessianOperator(model, own, loss, self_test=False)
    found.append(("build the operator with param_filter", refused(A.restrict, match_names("0.*"))))
    infinite = lambda model, batch: loss(model, batch) * float("inf")  # noqa: E731
    B = FSDPHessianOperator(model, own, infinite, weighting="batch-mean", self_test=False)
    found.append(("NaN or infinite entries", refused(B.matvec, A.space.random(1)[:, 0])))
    found.append(("FSDPHessianOperator", refused(HessianOperator, model, own, loss)))
    intercepted = fsdp_groups._INTERCEPTED
    fsdp_groups._INTERCEPTED = ("_of_another_torch",)
    found.append(("FSDP2 has no _of_another_torch", attempt(model)))
    fsdp_groups._INTERCEPTED = intercepted
    rules = tangents_module.forward_rules
    tangents_module._tangent = lambda gradient: torch.ones_like(gradient)
    found.append(("differs by", attempt(model)))
    assert rules is tangents_module.forward_rules
    return found


def test_what_cannot_be_had_is_refused_on_all_ranks_alike():
    of_ranks = on_ranks(2, refusals)
    for expected, (kind, message) in of_ranks[0]:
        assert expected in message, (expected, kind, message)
    assert [m for _, m in of_ranks[0]] == [m for _, m in of_ranks[1]]


def test_without_a_process_group_there_is_an_error():
    problem = problems.mlp()
    with pytest.raises(ProcessGroupError, match=r"call torch\.distributed\.init_process_group"):
        FSDPHessianOperator(problem.model, problem.batches, problem.loss_fn)


@pytest.mark.parametrize(
    ("version", "known"), [("2.6.0", True), ("2.15.1+cu132", True), ("3.0.0", False)]
)
def test_a_version_of_torch_that_was_not_seen_is_named(version, known):
    note = fsdp_groups.version_note(version)
    assert note == (
        "" if known else f"torch {version} is not known here, which was written for 2.6 to 2.15"
    )
