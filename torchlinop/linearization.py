"""The maps V ↦ A_b V of all batches at θ: kept between products, or rebuilt for each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar, get_args

from torch import Tensor, nn

from torchlinop.batches import Batch
from torchlinop.columns import ColumnChunks
from torchlinop.derivatives import Derivative, Function, LinearMap
from torchlinop.errors import CheckpointError, OptionError
from torchlinop.memory import free_bytes
from torchlinop.model_state import full_precision
from torchlinop.objective import Objective
from torchlinop.preflight import Preflight

log = logging.getLogger("torchlinop")

Policy = Literal["auto", "keep", "rebuild"]


T_co = TypeVar("T_co", covariant=True)


class Work(Protocol[T_co]):
    """The work done at θ for one batch: what is differentiated, and what it gives."""

    @property
    def of(self) -> Callable[[nn.Module, Batch], Tensor] | None:
        """The function of model and batch that is differentiated; None for the loss."""
        ...

    def __call__(self, f: Function, theta: Tensor, b: int, batch: Batch) -> T_co: ...


@dataclass(frozen=True)
class HessianProducts:
    """Differentiates the loss twice."""

    derivative: Derivative
    of: None = None

    def __call__(self, f: Function, theta: Tensor, b: int, batch: Batch) -> LinearMap:
        return self.derivative.hvp(f, theta)


class Linearization(Protocol[T_co]):
    """Lends the work done at θ for batch number b, under the conditions it is used in."""

    @property
    def name(self) -> str: ...
    @property
    def columns(self) -> ColumnChunks: ...
    @property
    def last(self) -> bool: ...  # whether the work may be freed as it is used
    def at(self, b: int, batch: Batch) -> AbstractContextManager[T_co]: ...


class Kept(Generic[T_co]):
    """The work done at θ is done at the first product and shared by all later ones."""

    name = "kept"
    last = False

    def __init__(self, objective: Objective, work: Work[T_co], columns: ColumnChunks) -> None:
        self.columns = columns
        self._objective = objective
        self._work = work
        self._done: dict[int, T_co] = {}

    @contextmanager
    def at(self, b: int, batch: Batch) -> Iterator[T_co]:
        done = self._done.get(b) or self._do(b, batch)
        device = self._objective.space.device
        with self._objective.explained(b, batch), full_precision(device):
            yield done

    def _do(self, b: int, batch: Batch) -> T_co:
        with self._objective.evaluating(b, batch, self._work.of) as f:  # one thread at a time
            if b not in self._done:
                self._done[b] = self._work(f, self._objective.theta, b, batch)
        return self._done[b]

    def __getstate__(self) -> dict[str, Any]:
        """Graphs cannot be pickled; they are built again at the first product."""
        return self.__dict__ | {"_done": {}}


class Rebuilt(Generic[T_co]):
    """The work done at θ is done again for every product, or block, batch by batch."""

    name = "rebuilt"
    last = True

    def __init__(self, objective: Objective, work: Work[T_co], columns: ColumnChunks) -> None:
        self.columns = columns
        self._objective = objective
        self._work = work

    @contextmanager
    def at(self, b: int, batch: Batch) -> Iterator[T_co]:
        with self._objective.evaluating(b, batch, self._work.of) as f:
            yield self._work(f, self._objective.theta, b, batch)


def mean_product(objective: Objective, maps: Linearization[LinearMap], V: Tensor) -> Tensor:
    """``Σ_b share_b A_b V`` for a block V (n, k)."""

    def term(b: int, batch: Batch) -> Tensor:
        with maps.at(b, batch) as product:
            return maps.columns.apply(product, V, last=maps.last)

    return objective.mean(term)


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
    name: str = "autograd"  # of the method, for people

    def __post_init__(self) -> None:
        ColumnChunks(self.column_chunk)
        if self.memory_budget is not None and not isinstance(self.memory_budget, int):
            raise OptionError(
                f"expected memory_budget to be a number of bytes, got {self.memory_budget!r}; "
                "pass 2 * 10**9, say"
            )
        if self.policy not in get_args(Policy):
            raise OptionError(
                f"unknown linearization {self.policy!r}; choose one of "
                f"{', '.join(get_args(Policy))}"
            )
        if self.policy == "keep" and not self.derivative.shares_work:
            raise OptionError(_cannot_keep(f"{self.derivative} shares no work between products"))

    def carry_out(
        self, objective: Objective, facts: Preflight, work: Work[T_co]
    ) -> Linearization[T_co]:
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
            return Kept(objective, work, columns)
        log.info("the graphs at theta are rebuilt for every product (budget %.1f MB)", budget / 1e6)
        return Rebuilt(objective, work, columns)


def _cannot_keep(reason: str) -> str:
    return f'linearization="keep" has nothing to keep: {reason}. Pass linearization="rebuild"'
