"""The maps V ↦ H_b V of all batches at θ: kept between products, or rebuilt for each."""

from __future__ import annotations

import logging
import threading
from typing import Any, Literal, Protocol, get_args

from torch import Tensor

from torchlinop.batches import Batch
from torchlinop.columns import ColumnChunks
from torchlinop.derivatives import Derivative, HessianMap
from torchlinop.errors import CheckpointError, OptionError
from torchlinop.memory import free_bytes
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
        self._building = threading.Lock()

    def __call__(self, b: int, batch: Batch, V: Tensor) -> Tensor:
        product = self._maps.get(b) or self._build(b, batch)
        with self._objective.explained(b, batch):
            return self._columns.apply(product, V, last=False)

    def _build(self, b: int, batch: Batch) -> HessianMap:
        with self._building:
            if b not in self._maps:
                with self._objective.evaluating(b, batch) as f:
                    self._maps[b] = self._derivative.hvp(f, self._objective.theta)
            return self._maps[b]

    def __getstate__(self) -> dict[str, Any]:
        """Graphs cannot be pickled; they are built again at the first product."""
        return self.__dict__ | {"_maps": {}, "_building": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _building=threading.Lock())


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


def linearization(
    policy: Policy,
    objective: Objective,
    derivative: Derivative,
    *,
    facts: Preflight,
    memory_budget: int | None,
    column_chunk: int | None,
) -> Linearization:
    """Keep the work at θ if ``memory_budget`` bytes hold it, by default half of the free ones.

    Raises:
        OptionError: unknown policy, or "keep" where there is nothing that can be kept.
        CheckpointError: "keep" for a model that recomputes its activations.
    """
    if policy not in get_args(Policy):
        raise OptionError(
            f"unknown linearization {policy!r}; choose one of {', '.join(get_args(Policy))}"
        )
    budget = free_bytes(objective.space.device) // 2 if memory_budget is None else memory_budget
    limit = max(1, budget // max(1, facts.batch_bytes))
    columns = ColumnChunks(column_chunk, limit)
    can_keep = derivative.shares_work and objective.data.pinned
    if policy == "keep" and facts.recomputes:
        raise CheckpointError(
            'linearization="keep" with a model that uses activation checkpointing: its graph is '
            'recomputed at every product, so nothing can be kept. Pass linearization="rebuild"'
        )
    if policy == "keep" and not can_keep:
        raise OptionError(
            f'linearization="keep" needs pin_data=True and a method that shares work between '
            f'products, got {derivative}; pass method="autograd" or linearization="rebuild"'
        )
    fits = can_keep and not facts.recomputes and facts.graph_bytes <= budget
    if policy == "keep" or (policy == "auto" and fits):
        log.info("the graphs at theta are kept: %.1f MB", facts.graph_bytes / 1e6)
        return Kept(objective, derivative, columns)
    log.info("the graphs at theta are rebuilt for every product (budget %.1f MB)", budget / 1e6)
    return Rebuilt(objective, derivative, columns)
