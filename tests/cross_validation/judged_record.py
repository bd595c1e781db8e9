"""The record: every cell measured, as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import judged_algorithms
import torch
from curvlinops_defects import DEFECTS
from judged_algorithms import ALGORITHMS, CASES
from judged_operators import CELLS, OPERATORS, THEIR_CELLS, error_of_ours, error_of_theirs

Results = dict[str, Any]

RECORD = Path(__file__).parents[2] / "docs" / "cross_validation.json"


def rounded(error: float | str) -> float | str:
    """Two digits; names of exceptions as they are."""
    return error if isinstance(error, str) else float(f"{error:.1e}")


def measured(
    earlier: Results, chosen: Callable[[str], bool], say: Callable[[str], None]
) -> Results:
    """All cells of the chosen names anew, the others as they were."""

    def part(section: str, name: str, measure: Callable[[], Any]) -> Any:
        if not chosen(name):
            return earlier[section][name]
        say(f"{section}: {name}")
        return measure()

    with_theirs = {name: judged for name, judged in OPERATORS.items() if judged.theirs}
    return {
        "versions": versions(),
        "operators": {n: part("operators", n, partial(of_ours, n)) for n in OPERATORS},
        "curvlinops": {n: part("curvlinops", n, partial(of_theirs, n)) for n in with_theirs},
        "algorithms": {n: part("algorithms", n, partial(of_algorithm, n)) for n in ALGORITHMS},
        "defects": {n: part("defects", n, partial(of_defect, n)) for n in DEFECTS},
    }


def of_ours(name: str) -> dict[str, list[float]]:
    """The errors in all cells, by loss."""
    return {
        loss: [rounded(error_of_ours(name, loss, cell)) for cell in CELLS]
        for loss in OPERATORS[name].losses
    }


def of_theirs(name: str) -> dict[str, list[float | str]]:
    """Those of curvlinops."""
    return {
        loss: [rounded(error_of_theirs(name, loss, cell)) for cell in THEIR_CELLS]
        for loss in OPERATORS[name].losses
    }


def of_algorithm(name: str) -> dict[str, float]:
    """By spectrum and dtype."""
    return {
        f"{s}, {d}": rounded(judged_algorithms.error(n, s, d)) for n, s, d in CASES if n == name
    }


def of_defect(name: str) -> list[float | str]:
    """Of curvlinops, and of ours."""
    torch.manual_seed(0)
    return [rounded(error) for error in DEFECTS[name][1]()]


def versions() -> dict[str, str]:
    packages = ("torch", "scipy", "numpy", "curvlinops-for-pytorch", "torchlinop")
    return {"Python": platform.python_version()} | {
        package: importlib.metadata.version(package) for package in packages
    }


def as_json(results: Results) -> str:
    """A line for every operator and loss."""
    parts = []
    for section, content in results.items():
        lines = []
        for name, value in content.items():
            if isinstance(value, dict):
                inner = [f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()]
                lines.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(inner) + "\n  }")
            else:
                lines.append(f"  {json.dumps(name)}: {json.dumps(value)}")
        parts.append(f" {json.dumps(section)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"
