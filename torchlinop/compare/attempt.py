"""One run of one solver: what came of it, in how long, or the first line of why nothing did."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from torchlinop.compare.timed_operator import SolverHangs, TimedOperator
from torchlinop.compare.watch import watched
from torchlinop.random_state import preserved_random_state, reseed

_LONG = 110  # letters of a reason


@dataclass(frozen=True)
class Attempt:
    """What a solver returned, or why it did not."""

    found: Any
    seconds: float
    failure: str = ""
    warnings: tuple[str, ...] = ()


def attempt(solve: Callable[[], Any], A: TimedOperator, seed: int) -> Attempt:
    """Call ``solve``, which multiplies by A. Whatever it raises, but for Ctrl-C, is its failure.

    Global random numbers are those of the seed, and as before afterwards. Warnings are kept.
    """
    found, failure = None, ""
    with seeded(seed, A.device), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        started = time.perf_counter()
        try:
            found = watched(solve, A)
            if A.device.type == "cuda":
                torch.cuda.synchronize(A.device)
        except (Exception, SolverHangs) as error:  # failures of solvers are rows
            failure = A.refused or reason(error)
        seconds = time.perf_counter() - started
    said = dict.fromkeys(_first_line(str(w.message)) for w in caught)
    return Attempt(found, seconds, failure, tuple(said))


def reason(error: BaseException) -> str:
    """The class of an exception, and its first line."""
    line = _first_line(str(error))
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _first_line(message: str) -> str:
    line = next(iter(message.strip().splitlines()), "")
    return line if len(line) <= _LONG else line[: _LONG - 3] + "..."


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """For solvers that draw from global generators, which are as before afterwards."""
    with preserved_random_state(device):
        reseed(seed, device)
        yield
