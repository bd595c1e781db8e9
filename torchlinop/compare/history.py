"""How near a solver comes for how much."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torchlinop.compare.registry import Candidate


@dataclass(frozen=True)
class History:
    """One run for every point, of one seed."""

    problem: str
    solver: str
    by: str  # "budget" of products, or "tolerance", for solvers that take no budget
    products: tuple[int, ...]
    seconds: tuple[float, ...]
    values: tuple[float, ...]  # what ``Comparison.measure`` names

    @classmethod
    def of(
        cls, problem: str, candidate: Candidate, points: Iterable[tuple[int, float, float]]
    ) -> History:
        """Points (products, seconds, value); of equal products the last, which was asked more."""
        of_cost = {point[0]: point for point in points}
        columns = tuple(zip(*(of_cost[cost] for cost in sorted(of_cost)), strict=True))
        by = "budget" if candidate.budgeted else "tolerance"
        return cls(problem, candidate.name, by, *(columns or ((), (), ())))
