"""The maps V ↦ A_b V of all batches at θ: kept between products, or rebuilt for each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar, get_args

from torch import Tensor, nn

from torchlinop.batches import Batch, tensors
from torchlinop.choices import refuse_unknown
from torchlinop.columns import ColumnChunks
from torchlinop.compiled import Step, as_programs
from torchlinop.derivatives import Derivative, Function, LinearMap
from torchlinop.errors import CheckpointError, DataError, MemoryEstimateError, OptionError
from torchlinop.memory import free_bytes
from torchlinop.model_state import full_precision
from torchlinop.objective import Objective
from torchlinop.preflight import Preflight
from torchlinop.traced import written_over

log = logging.getLogger("torchlinop")

Policy = Literal["auto", "keep", "rebuild"]

# Bytes of graphs and programs over those of graphs: 1.02 for an MLP, 1.46 for a GPT-2.
_WITH_PROGRAMS = 1.5


T_co = TypeVar("T_co", covariant=True)


class Work(Protocol[T_co]):
    """The work done at θ for one batch: what is differentiated, and what it gives."""

    @property
    def of(self) -> Callable[[nn.Module, Batch], Tensor] | None:
        """The function of model and batch that is differentiated; None for the loss."""
        ...

    def __call__(self, f: Function, theta: Tensor, start: int, batch: Batch) -> T_co:
        """``start`` is the number of the first sample of the batch, among all data."""
        ...


@dataclass(frozen=True)
class HessianProducts:
    """Differentiates the loss twice."""

    derivative: Derivative
    of: None = None

    def __call__(self, f: Function, theta: Tensor, start: int, batch: Batch) -> LinearMap:
        return self.derivative.hvp(f, theta)


@dataclass(frozen=True)
class AsPrograms:
    """Work at θ whose map is run as programs."""

    work: Work[LinearMap]
    steps: tuple[Step, ...]

    @property
    def of(self) -> Callable[[nn.Module, Batch], Tensor] | None:
        """What the work differentiates."""
        return self.work.of

    def __call__(self, f: Function, theta: Tensor, start: int, batch: Batch) -> LinearMap:
        return as_programs(self.work(f, theta, start, batch), self.steps)


class Linearization(Protocol[T_co]):
    """Lends the work done at θ for batch number b, under the conditions it is used in."""

    @property
    def name(self) -> str: ...
    @property
    def columns(self) -> ColumnChunks: ...
    @property
    def last(self) -> bool: ...  # whether the work may be freed as it is used
    def at(self, b: int, batch: Batch) -> AbstractContextManager[T_co]: ...
    def of(self, objective: Objective) -> Linearization[T_co]: ...  # the same work, for this one


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
        with self._objective.explained(b, batch), _refused_if_written(), full_precision(device):
            yield done

    def _do(self, b: int, batch: Batch) -> T_co:
        with self._objective.evaluating(b, batch, self._work.of) as f:  # one thread at a time
            if b not in self._done:
                start = self._objective.data.starts[b]
                fresh = self._objective.fresh(batch)
                self._done[b] = self._work(f, self._objective.theta, start, fresh)
        return self._done[b]

    def of(self, objective: Objective) -> Kept[T_co]:
        return Kept(objective, self._work, self.columns)

    def __getstate__(self) -> dict[str, Any]:
        """Graphs cannot be pickled; they are built again at the first product."""
        return self.__dict__ | {"_done": {}}


@contextmanager
def _refused_if_written() -> Iterator[None]:
    """Raise DataError where autograd finds that what a kept graph reads was written to."""
    try:
        yield
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error):
            raise DataError(written_over()) from error
        raise


class Rebuilt(Generic[T_co]):
    """The work done at θ is done again for every product, or block, batch by batch."""

    name = "rebuilt"
    last = True

    def __init__(self, objective: Objective, work: Work[T_co], columns: ColumnChunks) -> None:
        self.columns = columns
        self._objective = objective
        self._work = work
        self._versions: dict[int, list[int]] = {}  # of what is read for each batch

    @contextmanager
    def at(self, b: int, batch: Batch) -> Iterator[T_co]:
        self._refuse_written(b, batch)
        objective = self._objective
        with objective.evaluating(b, batch, self._work.of) as f:
            yield self._work(f, objective.theta, objective.data.starts[b], objective.fresh(batch))

    def of(self, objective: Objective) -> Rebuilt[T_co]:
        return Rebuilt(objective, self._work, self.columns)

    def _refuse_written(self, b: int, batch: Batch) -> None:
        """Raise DataError if a pinned batch, or a frozen parameter, is not what it was at first."""
        if self._objective.data.pinned:
            read = [*tensors(batch), *self._objective.frozen()]
            versions = [tensor._version for tensor in read if not tensor.is_inference()]
            if self._versions.setdefault(b, versions) != versions:
                raise DataError(written_over())

    def __getstate__(self) -> dict[str, Any]:
        """Versions are those of tensors here, not of their copies."""
        return self.__dict__ | {"_versions": {}}


def mean_product(objective: Objective, maps: Linearization[LinearMap], V: Tensor) -> Tensor:
    """``Σ_b share_b A_b V`` for a block V (n, k)."""

    def term(b: int, batch: Batch) -> Tensor:
        with maps.at(b, batch) as product:
            return maps.columns.apply(product, V, last=maps.last)

    return objective.mean(term, V)


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
    steps: tuple[Step, ...] = ()  # that are taken with the kept maps

    def __post_init__(self) -> None:
        ColumnChunks(self.column_chunk)
        if self.memory_budget is not None and not isinstance(self.memory_budget, int):
            raise OptionError(
                f"expected memory_budget to be a number of bytes, got {self.memory_budget!r}; "
                "pass 2 * 10**9, say"
            )
        refuse_unknown("linearization", self.policy, get_args(Policy))
        if self.steps and self.policy == "rebuild":
            raise OptionError(
                f'{self._keeper} needs the graphs at theta kept, got linearization="rebuild"; '
                "leave out one of the two"
            )
        if self._keeper and not self.derivative.shares_work:
            raise OptionError(
                self._nothing_kept(f"{self.derivative} shares no work between products")
            )

    def described(self, maps: Linearization[Any]) -> str:
        """How products are taken, for people."""
        return ", ".join([self.name, maps.name, *(step.name for step in self.steps)])

    @property
    def _keeper(self) -> str:
        """The option that does not go without kept graphs; empty if there is none."""
        keeps = ['linearization="keep"'] if self.policy == "keep" else []
        return " and ".join(keeps or [step.option for step in self.steps])

    def _nothing_kept(self, reason: str) -> str:
        instead = 'pass linearization="rebuild"' if self.policy == "keep" else "leave it out"
        return f"{self._keeper} has nothing to keep: {reason}; {instead}"

    def carry_out(
        self, objective: Objective, facts: Preflight, work: Work[T_co]
    ) -> Linearization[T_co]:
        """Keep the work at θ, or not.

        Raises:
            OptionError: "keep", or a step, for data that are read again for every product; a step
                that cannot be taken on the device.
            CheckpointError: the same for a model that recomputes its activations.
            MemoryEstimateError: a step, and the budget is too small for what it is taken with.
        """
        for step in self.steps:
            step.refuse_unfit(objective.space.device)
        if self._keeper and facts.packs_tensors:
            raise CheckpointError(
                self._nothing_kept("activation checkpointing recomputes its graph")
            )
        if self._keeper and not objective.data.pinned:
            raise OptionError(self._nothing_kept("pin_data=False reads new batches"))
        free = free_bytes(objective.space.device)
        budget = free // 2 if self.memory_budget is None else self.memory_budget
        columns = ColumnChunks(self.column_chunk, max(1, budget // max(1, facts.batch_bytes)))
        possible = self.derivative.shares_work and objective.data.pinned and not facts.packs_tensors
        needed = facts.graph_bytes * (_WITH_PROGRAMS if self.steps else 1)
        fits = possible and needed <= budget
        if self.policy == "keep" or (self.policy == "auto" and fits):
            log.info("the graphs at theta are kept: %.1f MB", facts.graph_bytes / 1e6)
            return Kept(objective, work, columns)
        if self.steps:
            raise MemoryEstimateError(
                f"{self._keeper} needs the graphs at theta kept, which take about "
                f"{needed / 1e6:.4g} MB with their programs, more than the budget of "
                f"{budget / 1e6:.4g} MB; pass a larger memory_budget, or leave it out"
            )
        too_many = f"{needed / 1e6:.1f} MB are more than the budget of {budget / 1e6:.1f} MB"
        reason = "as asked" if self.policy == "rebuild" else "nothing can be kept"
        log.info(
            "the graphs at theta are rebuilt for every product: %s",
            too_many if self.policy == "auto" and possible else reason,
        )
        return Rebuilt(objective, work, columns)
