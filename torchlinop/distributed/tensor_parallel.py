"""Exact products of tensor-parallel models: two backward passes, with DTensor's gaps closed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchlinop.distributed import mended_autograd
from torchlinop.distributed.gauss_newton import GaussNewton
from torchlinop.distributed.rank_data import Round
from torchlinop.distributed.sharded_objective import ShardedObjective


class DoubleBackward:
    """Reverse mode through the graph of a reverse pass, on DTensors.

    The backward of ``DTensor.from_local`` leaves the graph, silently: without the mended one, a
    standard plan of column- and row-wise layers gives products that are off by as much as their
    size.
    """

    name = "autograd"
    exact = True
    error = 0.0

    def hessian(self, objective: ShardedObjective, rounds: Iterable[Round], v: Tensor) -> Tensor:
        """H v: about three gradients."""
        total = torch.zeros_like(v)
        with mended_autograd.twice_differentiable_dtensors():
            for b, batch, share in rounds:
                parameters = objective.model.parameters()
                loss = objective.value(b, batch)
                g = _gradients(loss, [*parameters.values()], create_graph=True)
                Hv = _transposed(g, [*parameters.values()], _like(objective, parameters, v))
                total.add_(_flat(objective, parameters, Hv), alpha=share)
        return objective.summed(total)

    def gauss_newton(
        self, objective: ShardedObjective, rounds: Iterable[Round], JtMJ: GaussNewton, v: Tensor
    ) -> Tensor:
        """``Σ share Jᵀ M J v``: J is the transpose of the linear map ``u ↦ Jᵀ u``."""
        total = torch.zeros_like(v)
        with mended_autograd.twice_differentiable_dtensors():
            for b, batch, share in rounds:
                parameters = objective.model.parameters()
                leaves = [*parameters.values()]
                f = JtMJ.evaluate(objective, b, batch)
                w = torch.zeros_like(f, requires_grad=True)
                pulled = _gradients(f, leaves, w, create_graph=True)
                (Jv,) = _transposed(pulled, [w], _like(objective, parameters, v))
                u = JtMJ.weigh(objective, f.detach(), batch, Jv.detach().clone())
                product = _gradients(f, leaves, u)
                total.add_(_flat(objective, parameters, product), alpha=share)
        return objective.summed(total)


def _gradients(
    f: Tensor, leaves: Sequence[Tensor], u: Tensor | None = None, *, create_graph: bool = False
) -> list[Tensor]:
    """Gradients in the placements of their leaves, as part of the graph."""
    gradients = torch.autograd.grad(
        f, leaves, u, create_graph=create_graph, materialize_grads=True, retain_graph=True
    )
    return [_placed(g, leaf) for g, leaf in zip(gradients, leaves, strict=True)]


def _transposed(
    outputs: Sequence[Tensor], leaves: Sequence[Tensor], vectors: Sequence[Tensor]
) -> list[Tensor]:
    """``(∂ outputs / ∂ leaves)ᵀ vectors``, of those outputs that have a graph."""
    pairs = [(f, v) for f, v in zip(outputs, vectors, strict=True) if f.requires_grad]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in leaves]
    products = torch.autograd.grad(
        [f for f, _ in pairs],
        leaves,
        [v for _, v in pairs],
        retain_graph=True,
        materialize_grads=True,
    )
    return [_placed(product, leaf) for product, leaf in zip(products, leaves, strict=True)]


def _placed(gradient: Tensor, leaf: Tensor) -> Tensor:
    """That of a replicated parameter may be a sum that is not taken yet."""
    if isinstance(gradient, DTensor) and isinstance(leaf, DTensor):
        return gradient.redistribute(placements=leaf.placements)
    return gradient


def _like(
    objective: ShardedObjective, parameters: dict[str, nn.Parameter], v: Tensor
) -> list[Tensor]:
    """The parts of a local vector, sharded as the parameters are."""
    shards = objective.layout.split(v)
    return [_sharded(shards[name], p.data) for name, p in parameters.items()]


def _sharded(shard: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return shard
    return DTensor.from_local(
        shard,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def _flat(
    objective: ShardedObjective, parameters: dict[str, nn.Parameter], parts: Sequence[Tensor]
) -> Tensor:
    return objective.layout.flatten(dict(zip(parameters, parts, strict=True)))
