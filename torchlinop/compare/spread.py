"""A number over several seeds: its median, and from where to where."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Of the runs that gave a number; NaN if none did."""

    median: float = math.nan
    least: float = math.nan
    most: float = math.nan

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        there = [v for v in values if not math.isnan(v)]
        return cls(statistics.median_low(there), min(there), max(there)) if there else cls()

    def written(self, form: str) -> str:
        """``27 (26-28)``, or ``27`` where all are alike, or "-"."""
        if math.isnan(self.median):
            return "-"
        middle, low, high = (format(x, form) for x in (self.median, self.least, self.most))
        return middle if low == high else f"{middle} ({low}-{high})"


UNKNOWN = Spread()
