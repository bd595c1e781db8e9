"""Jᵀ M J for a model in shards: J is the Jacobian of its outputs, and M acts on outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from torchlinop.batches import Batch
from torchlinop.distributed.rank_data import Round
from torchlinop.distributed.sharded_objective import Outputs, ShardedObjective
from torchlinop.losses.base import OutputMap


@dataclass(frozen=True)
class GaussNewton:
    """What ways of multiplying by ``Σ share Jᵀ M J`` have in common; called on all ranks."""

    outputs: Outputs  # (model, batch) -> f
    metric: Callable[[Tensor, Batch], OutputMap]  # (f, batch) -> u ↦ M u

    def evaluate(self, objective: ShardedObjective, b: int, batch: Batch) -> Tensor:
        """f, on all ranks or on none."""
        return objective.together(lambda: self.outputs(objective.model.place(b), batch))

    def weigh(self, objective: ShardedObjective, f: Tensor, batch: Batch, u: Tensor) -> Tensor:
        """M u, on all ranks or on none."""
        return objective.together(lambda: self.metric(f, batch)(u))

    def pull(self, objective: ShardedObjective, round: Round, u: Tensor) -> None:
        """Add ``share Jᵀ u`` to the gradients."""
        b, batch, share = round
        f = self.evaluate(objective, b, batch)
        objective.backward((f * u.to(f.dtype)).sum(), share)
