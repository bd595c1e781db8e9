"""Medians, geometric means, Markdown tables and verdicts of benchmarks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def middle(values: Sequence[float]) -> float:
    """The median; NaN of nothing."""
    return statistics.median(values) if values else math.nan


def geometric_mean(values: Sequence[float]) -> float:
    """NaN of nothing."""
    return math.exp(statistics.fmean(math.log(v) for v in values)) if values else math.nan


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown, an empty one last."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def verdict(target: str, holds: Sequence[bool]) -> str:
    """Targets whose peers are missing are not judged."""
    if not holds:
        return f"- not judged: {target}"
    return f"- {'holds' if all(holds) else 'FAILS'} ({sum(holds)} of {len(holds)}): {target}"
