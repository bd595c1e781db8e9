"""Lines of JSON in a file, each written as soon as it is known, so that a stop loses none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchlinop.json_value import json_value

Record = Mapping[str, Any]


def append(path: Path, record: Record) -> None:
    """Write one record. NaN and infinity are no JSON, and become null."""
    with path.open("a") as file:
        file.write(json.dumps(json_value(record), allow_nan=False) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """All records; a last line that was cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]
