"""What a doctor finds: facts, warnings and faults, a line each."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

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
            fault = Finding("FAULT", subject, f"{type(error).__name__}: {error}")
            findings.append(fault if isinstance(error, TorchlinopError) else _raised(fault))
    findings.extend(
        Finding("warning", subject, f"{w.category.__name__}: {w.message}") for w in warned
    )


def _raised(fault: Finding) -> Finding:
    """An error that is none of ours: of the model or the loss."""
    text = f"the model or the loss raised {fault.text}; call loss(model, batch) in Python"
    return Finding(fault.level, fault.subject, text)
