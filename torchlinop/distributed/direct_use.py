"""Parameters that a loss takes from the model itself, where FSDP2 has not gathered them."""

from __future__ import annotations

from torch import Tensor

from torchlinop.distributed.sharded_objective import ShardedObjective
from torchlinop.errors import ShardingError


def refuse_direct_use(objective: ShardedObjective) -> None:
    """Look for parameters in shards among the leaves of a loss: a forward pass of one batch.

    A penalty of ``p.full_tensor()``, say, is not seen by what FSDP2 gathers, so that products
    would leave its second derivative out; nor are its gradients averaged over the ranks.

    Raises:
        ShardingError: there is one.
    """
    with objective.model.borrowed():
        ((b, batch, _),) = objective.first_round()
        shards = objective.model.parameters()  # before a pass leaves some of them gathered
        leaves = _leaves(objective.value(b, batch))
        direct = [name for name, shard in shards.items() if id(shard) in leaves]

    def refuse() -> None:
        if direct:
            more = f" and {len(direct) - 1} more" if len(direct) > 1 else ""
            raise ShardingError(
                f"the loss uses the shards of {direct[0]}{more} directly, and not in the forward "
                "pass of a module, where fully_shard gathers them; leave the term out: "
                "a weight decay of λ|θ|²/2 is a damping of λ"
            )

    objective.together(refuse)


def _leaves(loss: Tensor) -> set[int]:
    """Which tensors the graph of a loss ends in, by identity."""
    found: set[int] = set()
    seen, ahead = set(), [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        ahead += [following for following, _ in node.next_functions]
    return found
