"""The rows of a comparison: one solver on one problem, over all seeds, and how a row is read."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torchlinop.compare.spread import UNKNOWN, Spread

Verdict = Literal["ok", "not reached", "wrong", "false claim", "failed"]


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    header: str
    cell: Callable[[Any], str]  # of a row
    meaning: str = ""
    detail: bool = False  # on the page only


@dataclass(frozen=True)
class Row(ABC):
    """One solver on one problem. What is measured by every seed is a Spread, or of the worst."""

    problem: str
    solver: str
    seeds: int = 0  # runs
    failures: int = 0  # of these, without an answer
    failure: str = ""  # why, of the first
    false: tuple[str, ...] = ()  # claims that do not hold, of the seed with the most
    false_seeds: int = 0
    warnings: tuple[str, ...] = ()  # of the solver
    products: Spread = UNKNOWN
    calls: Spread = UNKNOWN
    seconds: Spread = UNKNOWN
    product_seconds: Spread = UNKNOWN  # of these, inside the matrix

    @property
    @abstractmethod
    def accuracy(self) -> float:
        """What is small for a good answer; NaN if there is none."""

    @property
    @abstractmethod
    def reached(self) -> bool:
        """Whether the answer is what was asked for."""

    @property
    def flaw(self) -> str:
        """What is wrong with an answer that is as accurate as asked, if anything is."""
        return ""

    @classmethod
    @abstractmethod
    def columns(cls) -> list[Column]:
        """Between the name of the solver and the remarks."""

    @property
    def verdict(self) -> Verdict:
        if self.failures:
            return "failed"
        if self.false:
            return "false claim"
        if self.flaw:
            return "wrong"
        return "ok" if self.reached else "not reached"

    @property
    def remarks(self) -> str:
        """Why it failed, false claims, flaws, and what it says where it fell short."""
        some = f" ({self.failures} of {self.seeds} seeds)" if self.failures < self.seeds else ""
        said = [self.failure + some] if self.failures else []
        said += [f"FALSE: {'; '.join(self.false)}"] if self.false else []
        said += [self.flaw] if self.flaw else []
        if self.verdict == "not reached" and self.warnings:
            said.append(f"says: {self.warnings[0]}")
        return "; ".join(said)


COSTS = [
    Column("products", lambda r: r.products.written(",.0f"), "columns multiplied by the matrix"),
    Column("calls", lambda r: r.calls.written(",.0f"), "calls of the matrix, a block each"),
    Column("s", lambda r: _seconds(r.seconds.median), "seconds, the median of the seeds"),
    Column(
        "s outside",
        lambda r: _seconds(r.seconds.median - r.product_seconds.median),
        "of these, outside of products: the solver's own work",
    ),
]
CLAIMED_RESIDUAL = Column(
    "claimed",
    lambda r: small(r.claimed_residual),
    "the same by the solver's own account",
    detail=True,
)


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """All columns of rows of one kind."""
    name = Column("solver", lambda r: r.solver)
    verdict = Column("", lambda r: r.verdict if r.verdict != "ok" else "")
    return [name, *type(rows[0]).columns(), verdict, Column("remarks", lambda r: r.remarks)]


def cells_of(row: Row, columns: Iterable[Column]) -> list[str]:
    """What a row shows in these columns."""
    return [column.cell(row) for column in columns]


def points_of(rows: Iterable[Row]) -> list[tuple[int, float, float]]:
    """Products, seconds and accuracy of the rows of one history, but for failures."""
    return [
        (int(row.products.median), row.seconds.median, row.accuracy)
        for row in rows
        if not row.failures
    ]


def small(value: float) -> str:
    """``3e-07``; "-" if it is not known."""
    return "-" if math.isnan(value) else f"{value:.0e}"


def _seconds(value: float) -> str:
    return "-" if math.isnan(value) else f"{max(0.0, value):.3g}"
