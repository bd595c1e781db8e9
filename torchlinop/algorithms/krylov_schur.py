"""Thick restarts: expand a Krylov space, put its wanted Ritz vectors in its place, repeat."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchlinop.algorithms.checkpoint import Checkpoint
from torchlinop.algorithms.krylov_decomposition import KrylovDecomposition, Loss
from torchlinop.algorithms.products import Products
from torchlinop.algorithms.ritz import Ritz, Status, Target, Which, order_of

__all__ = [
    "KrylovDecomposition", "Limits", "Ritz", "Run", "Status", "Target", "Which", "order_of",
]  # fmt: skip


@dataclass
class Limits:
    """When to stop though nothing has converged, and whom to tell how it goes."""

    max_matvecs: int
    callback: Callable[[int, Tensor, Tensor], object] | None = None

    def exceeded(self, products: Products, columns: int) -> Status | None:
        if products.matvecs + columns > self.max_matvecs:
            return "maxmatvecs"
        if products.late:
            return "maxseconds"
        return None


@dataclass
class Position:
    """What a run knows besides its decomposition, in numbers and strings."""

    goal: int  # the size of V at which to look next
    checked: int = 0  # up to where V is known to have no lost columns
    restarts: int = 0
    exploring: bool = False  # random columns whose Krylov space has not been seen yet
    before: list[float] | None = None  # the values wanted at the last breakdown
    last: tuple[int, float] | None = None  # size and log of the excess when looked at last
    status: Status | None = None  # once the pairs are found


@dataclass
class Run:
    """One run of the solver: where it stands, and how it got there."""

    decomposition: KrylovDecomposition
    target: Target
    limits: Limits
    checkpoint: Checkpoint | None = None
    history: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.at = Position(goal=self.decomposition.width)

    @property
    def restarts(self) -> int:
        return self.at.restarts

    @property
    def unsettled(self) -> bool:
        """Whether it stopped amid columns that came in for those of an exhausted Krylov space.

        Then nothing is known yet of eigenvalues outside of it, which may be beyond those found.
        """
        return self.at.status is None and self.at.exploring

    def solve(self) -> tuple[Ritz, Status]:
        """Expand and restart until the pairs are accurate, or a limit is exceeded."""
        V, at = self.decomposition, self.at
        if at.status:  # all is in the checkpoint
            return V.observe(self.target.which, V.size)[0], at.status
        while True:
            stop = self._expand_to(at.goal)
            if stop:
                self._save()  # before V is looked at, which a run without a stop would not do
            ritz, loss = self._observe()
            at.status = self._reached(ritz, loss)
            if at.status and not stop:
                self._save()
            status = at.status or stop
            if status:
                return ritz, status
            full = self._full
            if full:
                V.restart(ritz, self._keep(ritz))
                at.restarts += 1
                at.exploring = False
            at.goal, at.checked = self._next_check(ritz), V.size
            if full:
                self._save()

    @property
    def _full(self) -> bool:
        V = self.decomposition
        return V.size + V.width > V.capacity

    def _reached(self, ritz: Ritz, loss: Loss) -> Status | None:
        """How the run ends, if the pairs wanted are found."""
        at, target = self.at, self.target
        if self.decomposition.width == 0:
            return self._named("exact", ritz)
        # Or nothing is new since the last look; or a first block is as good as it was given.
        grown = self.decomposition.size > max(at.checked, self.decomposition.block_size)
        invariant = loss == "all" or (grown and target.exhausted_by_all(ritz))
        if invariant:
            if self._unchanged(ritz):
                return self._named("exact", ritz)
            wanted = ritz.values[: target.k].tolist()
            at.before = wanted if len(wanted) == target.k else None
        at.exploring |= invariant or loss != "none"
        settled = not at.exploring or (self._full and not invariant)
        if settled and target.exhausted(ritz):
            return self._named("converged", ritz)
        return None

    def _named(self, status: Status, ritz: Ritz) -> Status:
        return status if bool(self.target.reached(ritz).all()) else "stagnated"

    def _unchanged(self, ritz: Ritz) -> bool:
        """Whether the values wanted are those at the last breakdown: no copy was missing."""
        if self.at.before is None:
            return False
        before = _column(self.at.before)
        change = (ritz.values[: self.target.k] - before).abs().max()
        return bool(change <= self.target.zero * ritz.norm)

    def _expand_to(self, size: int) -> Status | None:
        """Expand until V has ``size`` columns, unless a limit is in the way."""
        V = self.decomposition
        while V.size < size:
            exceeded = self.limits.exceeded(V.products, V.width)
            if exceeded:
                return exceeded
            try:
                V.expand()
                if self.checkpoint and self.checkpoint.due:
                    self._save()
            except KeyboardInterrupt:
                if not V.size:
                    raise
                return "interrupted"
        return None

    def _next_check(self, ritz: Ritz) -> int:
        """The size of V at which to look next: O(log m) times first, then twice a restart.

        Sooner where the residuals, falling as they did, will be small enough; and at every step,
        once the Krylov space was found to be invariant.
        """
        V = self.decomposition
        last = V.size + (V.capacity - V.size) // V.width * V.width
        if self.at.exploring:
            return V.size + V.width
        if self.at.restarts == 0:
            more = V.size if V.size < self.target.k else V.size // 2
            blocks = max(1, more // V.width)
            return min(V.size + blocks * V.width, last, self._predicted(ritz))
        half = V.kept + (last - V.kept) // (2 * V.width) * V.width
        return min(half if V.size < half else last, self._predicted(ritz))

    def _predicted(self, ritz: Ritz) -> int:
        """Where the residuals come down to their bounds, on the line through the last two looks.

        At least half as far as the last step, lest it be looked at every column.
        """
        V, before = self.decomposition, self.at.last
        now = self.target.excess(ritz)
        self.at.last = (V.size, now)
        if before is None or before[0] >= V.size or not now < before[1] < math.inf:
            return V.capacity
        step = V.size - before[0]
        columns = max(now * step / (before[1] - now), step / 2)
        return V.size + max(1, math.ceil(columns / V.width)) * V.width

    def _keep(self, ritz: Ritz) -> int:
        """How many Ritz vectors to keep, so that blocks fill V again: k and some of the rest.

        As many more as have converged, as in ARPACK, for they have no use for room, and a sixth
        of it, up to half. Half from the beginning takes up to twice as many products at the dense
        end of a Hessian, none of it up to a fifth more where eigenvalues decay slowly (measured).
        """
        V, k = self.decomposition, self.target.k
        room = V.capacity - k
        found = int((ritz.residuals[:k] <= self.target.bounds(ritz)).sum())
        more = min(found + room // 6, room // 2)
        return V.capacity - max(1, (room - more) // V.width) * V.width

    def _observe(self) -> tuple[Ritz, Loss]:
        ritz, loss = self.decomposition.observe(self.target.which, self.at.checked)
        k = self.target.k
        matvecs = self.decomposition.products.matvecs
        self.history.append((matvecs, ritz.values[:k], ritz.residuals[:k]))
        if self.limits.callback:
            self.limits.callback(*self.history[-1])
        return ritz, loss

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        V = self.decomposition
        tensors, numbers = V.state()
        history = [
            [m, values.tolist(), residuals.tolist()] for m, values, residuals in self.history
        ]
        products = [V.products.matvecs, V.products.matmats]
        sizes = {"block_size": V.block_size, "ncv": V.capacity}
        numbers |= sizes | {"products": products, "history": history, "at": asdict(self.at)}
        vectors = {"rows", "previous", "block"} & tensors.keys()
        label = f"{self.at.restarts} restarts, {numbers['draws']} draws"  # or rows were rotated
        self.checkpoint.save(tensors, numbers, vectors, {"rows": label})

    def resume(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Stand where the run stood that saved these.

        Raises:
            OptionError: it was a run with another matrix.
        """
        self.decomposition.restore(tensors, numbers)
        self.decomposition.products.count(*numbers["products"])
        self.history = [
            (m, _column(values), _column(residuals)) for m, values, residuals in numbers["history"]
        ]
        self.at = Position(**numbers["at"])


def _column(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)
