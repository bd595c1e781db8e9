"""Every solver on every problem, and what was left out."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

import torchlinop
from torchlinop.compare.comparison import INTERRUPTED, Comparison
from torchlinop.compare.history import History
from torchlinop.compare.registry import Candidate, Registry, Wanted
from torchlinop.compare.rows import Row
from torchlinop.compare.subject import Subject
from torchlinop.errors import OptionError, SymmetryError
from torchlinop.settings import hidden

Measured = tuple[Row, History | None]


@dataclass(frozen=True)
class Measures:
    """How one kind of solver is measured."""

    run: Callable[[Subject, Candidate], Measured]
    row: Callable[..., Row]  # (problem, solver, **fields), for one that is not run
    which: str = ""


@dataclass
class Sweep:
    """What was measured so far."""

    rows: list[Row] = field(default_factory=list)
    histories: list[History] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def take(self, subject: Subject, candidate: Candidate, measures: Measures) -> None:
        row, history = measures.run(subject, candidate)
        self.rows.append(row)
        if history and history.products:
            self.histories.append(history)

    def comparison(
        self,
        title: str,
        measure: str,
        facts: Mapping[str, str],
        notes: tuple[str, ...],
        target: float = math.nan,
    ) -> Comparison:
        """What is shown of it."""
        return Comparison(
            title,
            measure,
            tuple(self.rows),
            tuple(self.histories),
            facts,
            self.left_out,
            target,
            notes,
            tuple(self.warnings),
        )


def sweep(
    subjects: Sequence[Subject],
    registry: Registry,
    wanted: Iterable[Wanted] | None,
    measures: Measures,
    *,
    progress: bool = False,
) -> Sweep:
    """Measure the solvers wanted on all subjects; ``wanted=None`` is all that suit.

    What does not suit is left out, unless it was asked for by its name: then it is a row with its
    reason.
    Ctrl-C ends it with what there is.

    Raises:
        OptionError: an unknown name. SymmetryError: a matrix is not symmetric, as all have to be.
    """
    asked: list[Wanted] | None = None
    if wanted is not None:
        asked = [wanted] if isinstance(wanted, str) else list(wanted)
    chosen = registry.select(asked)
    for subject in subjects:
        _refuse_asymmetric(subject, chosen)
    done = Sweep(warnings=[w for s in subjects for w in s.warnings])
    with tqdm(total=len(subjects) * len(chosen), disable=hidden(progress)) as bar:
        try:
            for subject in subjects:
                for candidate in chosen:
                    bar.set_description(candidate.name[:50])
                    why_not = _unsuited(candidate, subject, measures.which)
                    if not why_not:
                        done.take(subject, candidate, measures)
                    elif not _by_name(candidate, asked):
                        done.left_out[candidate.name] = why_not
                    else:
                        failed = {"seeds": 1, "failures": 1, "failure": why_not}
                        done.rows.append(measures.row(subject.name, candidate.name, **failed))
                    bar.update()
        except KeyboardInterrupt:
            if not done.rows:
                raise
            done.warnings.append(INTERRUPTED)
    if not done.rows:
        reasons = "; ".join(f"{name}: {why}" for name, why in done.left_out.items())
        raise OptionError(f"no {registry.kind} is left to compare ({reasons}); choose others")
    return done


def _by_name(candidate: Candidate, asked: list[Wanted] | None) -> bool:
    """Whether it was asked for itself: neither by a pattern, nor because all were."""
    return asked is not None and any(
        item in (candidate, candidate.name, candidate.solve) for item in asked
    )


def _unsuited(candidate: Candidate, subject: Subject, which: str) -> str:
    asymmetric = subject.asymmetry if candidate.symmetric else ""
    return candidate.missing() or asymmetric or candidate.unsuited(subject.operator, which)


def _refuse_asymmetric(subject: Subject, chosen: Sequence[Candidate]) -> None:
    if not subject.symmetric and all(candidate.symmetric for candidate in chosen):
        raise SymmetryError(
            f"{subject.asymmetry}, and all solvers chosen are for symmetric matrices; compare "
            "them on A.T @ A or (A + A.T) / 2, or register one with symmetric=False"
        )


def seeds_of(seeds: int | Sequence[int]) -> list[int]:
    """So many, or these. Raises OptionError if there is none, or one is no seed."""
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not numbers:
        raise OptionError(f"expected at least one seed, got {seeds}; leave it out")
    if not all(0 <= seed < 2**32 for seed in numbers):
        raise OptionError(f"expected seeds from 0 to 2**32 - 1, got {numbers}; leave them out")
    return numbers


def facts_of(subjects: Sequence[Subject], asked: str, seeds: Sequence[int]) -> dict[str, str]:
    """What was asked, of which matrices, and where."""
    shown = ", ".join(map(str, seeds)) if len(seeds) <= 5 else f"{seeds[0]} to {seeds[-1]}"
    return {
        "asked": f"{asked}; seeds {shown}",
        **{s.name: repr(s.operator) + s.knowledge for s in subjects},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}, torchlinop {torchlinop.__version__}",
    }
