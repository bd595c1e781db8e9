"""The maps V ↦ H_b V of all batches at θ: kept between products, or rebuilt for each."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from torch import Tensor

from torchlinop.batches import Batch
from torchlinop.columns import ColumnChunks
from torchlinop.derivatives import Derivative, HessianMap
from torchlinop.errors import CheckpointError, OptionError
from torchlinop.memory import free_bytes
from torchlinop.model_state import full_precision
from torchlinop.objective import Objective
from torchlinop.preflight import Preflight

log = logging.getLogger("torchlinop")

Policy = Literal["auto", "keep", "rebuild"]


class Linearization(Protocol):
    """Gives ``H_b V`` for batch number b."""

    name: str

    def __call__(self, b: int, batch: Batch, V: Tensor) -> Tensor: ...


class Kept:
    """The work done at θ is done at the first product and shared by all later ones."""

    name = "kept"

    def __init__(self, objective: Objective, derivative: Derivative, columns: ColumnChunks) -> None:
        self._objective = objective
        self._derivative = derivative
        self._columns = columns
        self._maps: dict[int, HessianMap] = {}

    def __call__(self, b: int, batch: Batch, V: Tensor) -> Tensor:
        product = self._maps.get(b) or self._build(b, batch)
        with self._objective.explained(b, batch), full_precision(V.device):
            return self._columns.apply(product, V, last=False)

    def _build(self, b: int, batch: Batch) -> HessianMap:
        with self._objective.evaluating(b, batch) as f:  # one thread at a time
            if b not in self._maps:
                self._maps[b] = self._derivative.hvp(f, self._objective.theta)
        return self._maps[b]

    def __getstate__(self) -> dict[str, Any]:
        """Graphs cannot be pickled; they are built again at the first product."""
        return self.__dict__ | {"_maps": {}}


class Rebuilt:
    """The work done at θ is done again for every product, or block, batch by batch."""

    name = "rebuilt"

    def __init__(self, objective: Objective, derivative: Derivative, columns: ColumnChunks) -> None:
        self._objective = objective
        self._derivative = derivative
        self._columns = columns

    def __call__(self, b: int, batch: Batch, V: Tensor) -> Tensor:
        with self._objective.evaluating(b, batch) as f:
            product = self._derivative.hvp(f, self._objective.theta)
            return self._columns.apply(product, V, last=True)


@dataclass(frozen=True)
class LinearizationPlan:
    """What the user asked for; refused here if it cannot be, before the model runs.

    Raises:
        OptionError: unknown policy, or "keep" with a derivative that has nothing to keep.
    """

    derivative: Derivative
    policy: Policy
    memory_budget: int | None  # bytes that kept graphs may take; by default half of the free ones
    column_chunk: int | None

    def __post_init__(self) -> None:
        ColumnChunks(self.column_chunk)
        if self.policy not in get_args(Policy):
            raise OptionError(
                f"unknown linearization {self.policy!r}; choose one of "
                f"{', '.join(get_args(Policy))}"
            )
        if self.policy == "keep" and not self.derivative.shares_work:
            raise OptionError(_cannot_keep(f"{self.derivative} shares no work between products"))

    def carry_out(self, objective: Objective, facts: Preflight) -> Linearization:
        """Keep the work at θ, or not.

        Raises:
            OptionError: "keep" for data that are read again for every product.
            CheckpointError: "keep" for a model that recomputes its activations.
        """
        free = free_bytes(objective.space.device)
        budget = free // 2 if self.memory_budget is None else self.memory_budget
        limit = max(1, budget // max(1, facts.batch_bytes))
        columns = ColumnChunks(self.column_chunk, limit)
        if self.policy == "keep" and facts.packs_tensors:
            raise CheckpointError(_cannot_keep("activation checkpointing recomputes its graph"))
        if self.policy == "keep" and not objective.data.pinned:
            raise OptionError(_cannot_keep("pin_data=False reads new batches"))
        possible = self.derivative.shares_work and objective.data.pinned and not facts.packs_tensors
        fits = possible and facts.graph_bytes <= budget
        if self.policy == "keep" or (self.policy == "auto" and fits):
            log.info("the graphs at theta are kept: %.1f MB", facts.graph_bytes / 1e6)
            return Kept(objective, self.derivative, columns)
        log.info("the graphs at theta are rebuilt for every product (budget %.1f MB)", budget / 1e6)
        return Rebuilt(objective, self.derivative, columns)


def _cannot_keep(reason: str) -> str:
    return f'linearization="keep" has nothing to keep: {reason}. Pass linearization="rebuild"'
