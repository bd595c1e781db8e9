"""Sharded models as flat vectors: the whole vector is that of one process, whatever the layout."""

import pytest
import torch
import torch.distributed as dist
from processes import failures, on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from torchlinop import match_names
from torchlinop.distributed.sharded_layout import ShardedLayout
from torchlinop.parameters import ParameterLayout


class Net(nn.Module):
    """Sizes that no number of ranks divides, a scalar, a frozen and a tied parameter."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.up = nn.Linear(6, 7)
        self.down = nn.Linear(7, 6)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.down.bias.requires_grad_(False)


def net():
    torch.manual_seed(3)
    return Net().double()


def plain(world):
    return net()


def fsdp(world):
    model = net()
    fully_shard(model.up)
    fully_shard(model, ignored_params={model.scale})
    return model


def hsdp(world):
    model = net()
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards"))
    fully_shard(model.up, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params={model.scale})
    return model


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def tensor_parallel(world):
    return parallelize_module(net(), init_device_mesh("cpu", (world,)), PLAN)


def fsdp_of_tensor_parallel(world):
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensors"))
    model = parallelize_module(net(), mesh["tensors"], PLAN)
    fully_shard(model, mesh=mesh["data"], ignored_params={model.scale})
    return model


def replicas_of_tensor_parallel(world):
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensors"))
    return parallelize_module(net(), mesh["tensors"], PLAN)


SHARDINGS = [
    plain,
    fsdp,
    hsdp,
    tensor_parallel,
    fsdp_of_tensor_parallel,
    replicas_of_tensor_parallel,
]


def facts(sharding):
    """What is told to the judge: vectors made of the shards, and how many entries are owned."""
    model = sharding(dist.get_world_size())
    layout = ShardedLayout.of(model)
    space = layout.space()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    local = layout.flatten(parameters)
    back = layout.split(local)
    shards = {n: p.to_local() if isinstance(p, DTensor) else p for n, p in parameters.items()}
    block = torch.stack([local, 2 * local], dim=1)
    return {
        "names": list(back),
        "same": all(torch.equal(back[name], shards[name]) for name in back),
        "block": all(
            torch.equal(v[..., 1], 2 * shards[name]) for name, v in layout.unflatten(block).items()
        ),
        "whole": layout.gather(local),
        "scattered": torch.equal(layout.scatter(layout.gather(local)), local),
        "owned": layout.owned,
        "rows": (layout.local_size, space.local_size, len(local)),
        "norm": space.norm(local),
        "inner": space.inner(local[:, None], block),
        "random": [
            layout.gather(space.random(2, 5, d)) for d in ("gaussian", "rademacher", "sphere")
        ],
    }


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_shards_make_up_the_vector_of_one_process(sharding, world_size):
    model = net()
    layout = ParameterLayout.of(model)
    theta = layout.flatten(dict(model.named_parameters()))
    everywhere = on_ranks(world_size, facts, sharding)
    assert sum(facts["owned"] for facts in everywhere) == layout.size
    for found in everywhere:
        assert found["names"] == [name for slot in layout.slots for name in slot.names]
        assert all(found[name] for name in ("same", "block", "scattered"))
        assert len(set(found["rows"])) == 1
        assert torch.equal(found["whole"], theta)
        torch.testing.assert_close(found["norm"], theta.norm(), rtol=1e-14, atol=0)
        assert torch.equal(found["norm"], everywhere[0]["norm"])
        assert torch.equal(found["inner"], everywhere[0]["inner"])
        torch.testing.assert_close(found["inner"][0, 1], 2 * (theta @ theta), rtol=1e-14, atol=0)
        for drawn, first in zip(found["random"], everywhere[0]["random"], strict=True):
            assert torch.equal(drawn, first)


def filtered():
    layout = ShardedLayout.of(fsdp(2), match_names("up.*", "norm.*"))
    return layout.names, layout.layout.frozen


def test_a_filter_selects_by_name_as_for_one_process():
    whole = ParameterLayout.of(net(), match_names("up.*", "norm.*"))
    assert on_ranks(2, filtered) == [(whole.names, whole.frozen)] * 2


def of_partial():
    model = nn.Linear(3, 2, bias=False)
    mesh = init_device_mesh("cpu", (2,))
    model.weight = nn.Parameter(DTensor.from_local(torch.ones(2, 3), mesh, [Partial()]))
    ShardedLayout.of(model)


def of_wrong_local_shape():
    model = nn.Linear(3, 3, bias=False)
    mesh = init_device_mesh("cpu", (2,))
    rows = torch.ones(1 + dist.get_rank(), 3)  # torch.chunk gives two rows to the first rank
    shape, stride = torch.Size((3, 3)), (3, 1)
    of_rows = DTensor.from_local(rows, mesh, [Shard(0)], shape=shape, stride=stride)
    model.weight = nn.Parameter(of_rows)
    ShardedLayout.of(model)


def of_half_the_ranks():
    group = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    model = nn.Linear(3, 2, bias=False)
    mesh = init_device_mesh("cpu", (2,))
    model.weight = nn.Parameter(distribute_tensor(torch.ones(2, 3), mesh, [Shard(0)]))
    ShardedLayout.of(model, group=group)


def of_different_models():
    ShardedLayout.of(nn.Linear(3, 2 + dist.get_rank()))


def of_wrong_vectors():
    layout = ShardedLayout.of(fsdp(2))
    with pytest.raises(ValueError, match=r"expected a vector of shape \(\d+,\) or a block"):
        layout.split(torch.zeros(layout.size, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"expected the shard .* of 'up.weight', got"):
        layout.flatten(layout.split(layout.flatten(dict(fsdp(2).named_parameters()))) | whole())
    named = dict(fsdp(2).named_parameters())
    del named["scale"]
    with pytest.raises(ValueError, match="'scale' is missing"):
        layout.flatten(named)
    with pytest.raises(ValueError, match=r"expected .* rows \(this rank holds"):
        layout.gather(torch.zeros(layout.size))


def whole():
    return {"up.weight": torch.zeros(7, 6)}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (of_partial, "(Partial(sum) is neither)"),
        (of_wrong_local_shape, "the local shape does not follow from it"),
        (of_half_the_ranks, "hold 3 different entries of parameter 'weight', which has 6"),
        (of_different_models, "have models of different parameters"),
    ],
)
def test_an_unknown_sharding_is_refused_on_every_rank(function, message):
    for kind, said in failures(2, function):
        assert kind == "ParameterError"
        assert message in said


def test_vectors_of_another_shape_are_refused():
    assert on_ranks(2, of_wrong_vectors) == [None, None]
