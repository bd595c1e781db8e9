"""Exact products under FSDP2: dual numbers through the model's own forward and backward pass."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchlinop.batches import Batch
from torchlinop.distributed.gauss_newton import GaussNewton
from torchlinop.distributed.rank_data import Round
from torchlinop.distributed.sharded_objective import ShardedObjective
from torchlinop.distributed.tangents import tangents


class DualNumbers:
    """Forward mode through a stock ``fully_shard`` model.

    Wherever FSDP2 gathers parameters W, it is given ``W + ε V`` with the gathered piece of the
    direction. The ε part of the gradient is the Hessian's product, and FSDP2 reduces it in place
    of the gradient. Activations and gathered pieces have a tangent each.
    """

    name = "forward_over_reverse"
    exact = True
    error = 0.0

    def hessian(self, objective: ShardedObjective, rounds: Iterable[Round], v: Tensor) -> Tensor:
        """H v: four gradients."""
        direction = objective.model.directions(v)
        module = objective.model.module
        for b, batch, share in rounds:
            with (
                forward_ad.dual_level(),
                tangents(module, direction, reverse=True),
            ):
                objective.backward(objective.value(b, batch), share)
        return objective.collected()

    def gauss_newton(
        self, objective: ShardedObjective, rounds: Iterable[Round], JtMJ: GaussNewton, v: Tensor
    ) -> Tensor:
        """``Σ share Jᵀ M J v``: J v by dual numbers, and one forward pass more for Jᵀ."""
        direction = objective.model.directions(v)
        module = objective.model.module
        for b, batch, share in rounds:
            with (
                forward_ad.dual_level(),
                tangents(module, direction, reverse=False),
                torch.no_grad(),
            ):

                def pushed(b: int = b, batch: Batch = batch) -> Tensor:
                    f, Jv = forward_ad.unpack_dual(JtMJ.outputs(objective.model.place(b), batch))
                    f, Jv = f.clone(), torch.zeros_like(f) if Jv is None else Jv.clone()
                    return JtMJ.metric(f, batch)(Jv)

                u = objective.together(pushed)
            JtMJ.pull(objective, (b, batch, share), u)
        return objective.collected()
