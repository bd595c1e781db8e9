"""What a doctor finds: facts, warnings and faults, a line each."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torchlinop.command_line.report import place_of
from torchlinop.errors import TorchlinopError, TorchlinopWarning

Level = Literal["ok", "note", "warning", "FAULT"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    subject: str  # model, data, matrix, product
    text: str

    def __str__(self) -> str:
        return f"  {self.level:8}{self.subject:9}{' '.join(self.text.split())}"


@contextmanager
def examining(subject: str, findings: list[Finding]) -> Iterator[None]:
    """What is raised inside is a fault, and what is warned of a warning."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", TorchlinopWarning)
        try:
            yield
        except Exception as error:
            findings.append(Finding("FAULT", subject, _told(error)))
    findings.extend(
        Finding("warning", subject, f"{w.category.__name__}: {w.message}") for w in warned
    )


def _told(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    return text if isinstance(error, TorchlinopError) else f"raised {text} ({place_of(error)})"
