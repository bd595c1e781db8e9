"""A plugin of pytest that writes the outcome of every test when it is known, slow ones last.

TORCHLINOP_BENCH_RECORDS=records.jsonl python -m pytest -p torchlinop.bench.outcomes tests/gpu
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torchlinop.bench.records import append

VARIABLE = "TORCHLINOP_BENCH_RECORDS"
SECTION = "tests"

# In the names of tests that compile, or run under a checker: seconds or minutes each.
_SLOW = ("compile", "both]", "sanitizer")


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Slow tests last: where time runs out, they are what is missing."""
    items.sort(key=lambda item: any(word in item.nodeid for word in _SLOW))


def pytest_runtest_logreport(report: Any) -> None:
    """Once a test: for its call, or for what went wrong before or after it."""
    if report.when == "call" or report.outcome != "passed":
        broken = report.outcome == "failed" and report.when != "call"
        _write(report.nodeid, "error" if broken else report.outcome, report)


def pytest_collectreport(report: Any) -> None:
    """For files that are skipped as a whole, or cannot be imported."""
    if report.outcome != "passed":
        _write(report.nodeid, "error" if report.outcome == "failed" else "skipped", report)


def _write(name: str, outcome: str, report: Any) -> None:
    reason = ""
    if hasattr(report, "wasxfail"):
        outcome = {"skipped": "xfailed", "passed": "xpassed"}[outcome]
        reason = report.wasxfail
    elif outcome == "skipped":
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    elif outcome != "passed":
        reason = (report.longreprtext.strip().splitlines() or [""])[-1]
    seconds = getattr(report, "duration", 0.0)
    record = {"test": name, "outcome": outcome, "seconds": seconds, "reason": reason[:300]}
    append(Path(os.environ[VARIABLE]), {"section": SECTION, **record})
