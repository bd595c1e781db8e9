"""A stage: a piece of the benchmark that gives records one by one, in a share of the time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from torchlinop.bench.clock import Clock
from torchlinop.bench.records import Record


@dataclass(frozen=True)
class Setting:
    """Where a stage runs, and for how long."""

    device: torch.device
    tiny: bool  # a rehearsal, whose numbers mean nothing
    clock: Clock


@dataclass(frozen=True)
class Stage:
    """``run(setting)`` yields records of ``section``, each when it is known."""

    section: str
    subject: str  # what of it: a workload, say
    weight: float  # its part of the time
    run: Callable[[Setting], Iterator[Record]]

    @property
    def name(self) -> str:
        return f"{self.section}:{self.subject}"


def failure_of(error: Exception) -> str:
    """What a record says of what was raised, by whatever was measured."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"fails: {type(error).__name__}: {lines[0][:200]}"
