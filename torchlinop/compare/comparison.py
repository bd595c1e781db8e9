"""What a comparison found: rows of a table, histories, and facts that hold for all of them."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from torchlinop.algorithms.result import optional
from torchlinop.compare.history import History
from torchlinop.compare.page import page
from torchlinop.compare.rows import Row, cells_of, columns_of
from torchlinop.compare.text_table import text_table
from torchlinop.json_value import json_value

_FORMAT = 1
INTERRUPTED = "interrupted: these are the rows that there were"


@dataclass(frozen=True, repr=False)
class Comparison:
    """All solvers on all problems. Printed as a table; ``to_html`` gives a page with pictures."""

    title: str
    measure: str  # what is small for a good answer: the vertical axis of pictures
    rows: tuple[Row, ...]
    histories: tuple[History, ...]
    facts: Mapping[str, str]  # what was asked, of whom, and where
    left_out: Mapping[str, str]  # solvers that were not run, and why
    target: float = math.nan  # of the measure, if one was asked for
    notes: tuple[str, ...] = ()  # how it was measured, a sentence each
    warnings: tuple[str, ...] = field(default=())

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it before all solvers had run."""
        return INTERRUPTED in self.warnings

    @property
    def problems(self) -> tuple[str, ...]:
        """Their names, in order."""
        return tuple(dict.fromkeys(row.problem for row in self.rows))

    def row(self, solver: str, problem: str | None = None) -> Row:
        """The row of a solver on a problem, the first unless named.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if row.solver == solver and problem in (None, row.problem):
                return row
        known = ", ".join(dict.fromkeys(row.solver for row in self.rows))
        raise KeyError(f"no row of {solver!r}; there are {known}")

    def to_dict(self) -> dict[str, Any]:
        """Everything as dictionaries, lists, numbers and strings; NaN and infinity as None."""
        environment = {"torch": torch.__version__, "python": platform.python_version()}
        content = json_value(dataclasses.asdict(self))
        return {"format": _FORMAT, "environment": environment, **content}

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)

    def save(self, path: str | Path) -> None:
        """Write the JSON to a file."""
        # Half a surrogate pair, as of file names, is an escape of JSON.
        content = (self.to_json() + "\n").encode("utf-8", "backslashreplace")
        Path(path).write_bytes(content)

    def to_html(self, path: str | Path) -> Path:
        """Write a page of its own, which loads nothing from elsewhere, and return its path."""
        target = Path(path)
        target.write_text(page(self), encoding="utf-8", errors="replace")
        return target

    def to_dataframe(self) -> Any:
        """A pandas DataFrame, a row a problem and solver; medians of what is spread over seeds.

        Raises:
            OptionError: pandas is not installed.
        """
        return optional("pandas").DataFrame([_flat(dataclasses.asdict(row)) for row in self.rows])

    def __repr__(self) -> str:
        lines = [f"Comparison  {self.title}"]
        lines += [f"  {name}: {fact}" for name, fact in self.facts.items()]
        for problem in self.problems:
            rows = [row for row in self.rows if row.problem == problem]
            columns = [c for c in columns_of(rows) if not c.detail]
            lines += ["", problem]
            lines += text_table([c.header for c in columns], [cells_of(r, columns) for r in rows])
        if self.left_out:
            lines += ["", "left out: " + "; ".join(f"{n} ({w})" for n, w in self.left_out.items())]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A spread as its median under the plain name, and its ends beside it."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= {name: value["median"], f"{name}_least": value["least"]}
            flat[f"{name}_most"] = value["most"]
        else:
            flat[name] = "; ".join(value) if isinstance(value, tuple) else value
    return flat
