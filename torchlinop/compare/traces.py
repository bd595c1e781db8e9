"""Trace estimators at equal products: true errors, and whether error bars hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchlinop.algorithms.trace_result import TraceResult
from torchlinop.compare.comparison import Comparison
from torchlinop.compare.history import History
from torchlinop.compare.registry import Candidate, Wanted, trace_estimator
from torchlinop.compare.request import TraceRequest
from torchlinop.compare.rows import COSTS, Column, Row, points_of, small
from torchlinop.compare.runs import Run, common, run_of
from torchlinop.compare.spread import UNKNOWN, Spread
from torchlinop.compare.subject import Subject, Truth, subjects_of
from torchlinop.compare.sweep import Measures, facts_of, seeds_of, sweep
from torchlinop.errors import NonFiniteError, OptionError, VectorError

_FEWEST = 4  # of the products, that a point of a history takes: an eighth, a quarter, a half, all
_CALIBRATED = 0.7  # of error bars of two standard errors cover the truth, at least


@dataclass(frozen=True)
class TraceRow(Row):
    """A trace estimator on a matrix, over all seeds. Relative to Σ|λ|, or |tr A|."""

    error: float = math.nan  # root mean square
    bias: float = math.nan  # the mean error over its own standard error
    coverage: float = math.nan  # of errors within two of the standard errors given
    stderr: float = math.nan  # as given, root mean square
    estimate: Spread = UNKNOWN

    @property
    def accuracy(self) -> float:
        return self.error

    @property
    def reached(self) -> bool:
        return True

    @classmethod
    def columns(cls) -> list[Column]:
        return [
            *COSTS,
            Column("estimate", lambda r: r.estimate.written(".5g"), "of tr A", detail=True),
            Column("RMS error", lambda r: small(r.error), "root mean square, relative to Σ|λ|"),
            Column(
                "bias",
                lambda r: "-" if math.isnan(r.bias) else f"{r.bias:+.1f} s.e.",
                "the mean error, in standard errors of that mean over the seeds",
                detail=True,
            ),
            Column("claimed s.e.", lambda r: small(r.stderr), "the standard errors given"),
            Column(
                "coverage",
                lambda r: "-" if math.isnan(r.coverage) else f"{r.coverage:.2f}",
                "the fraction of errors within two standard errors; .95 if they are right",
            ),
        ]


def compare_traces(
    problems: Any,
    num_matvecs: int = 60,
    estimators: Iterable[Wanted] | None = None,
    *,
    seconds: float = 60.0,
    seeds: int | Sequence[int] = 20,
    truth: Truth | Mapping[str, Truth] = None,
    histories: bool = True,
    progress: bool = False,
) -> Comparison:
    """Estimate tr A from ``num_matvecs`` products by every estimator, and judge the errors.

    Without known eigenvalues (see `compare` for ``truth``) there is the spread over seeds alone.
    An estimator is a function ``(operator, request) -> (estimate, standard error)``, or a number,
    registered by ``@trace_estimator("name")``. Costs ``seeds`` times that, and as much again for
    the histories. Errors: those of `compare`.
    """
    if num_matvecs < _FEWEST:
        raise OptionError(
            f"expected num_matvecs to be at least {_FEWEST}, got {num_matvecs}; leave it out"
        )
    subjects, numbers = subjects_of(problems, truth), seeds_of(seeds)

    def row(s: Subject, candidate: Candidate, budget: int) -> TraceRow:
        requests = [TraceRequest(budget, seed) for seed in numbers]
        runs = [run_of(s, candidate, r, _number, budget=budget, seconds=seconds) for r in requests]
        return row_of(s, candidate.name, runs)

    def measured(subject: Subject, candidate: Candidate) -> tuple[TraceRow, History | None]:
        whole = row(subject, candidate, num_matvecs)
        if not histories or subject.eigenvalues is None or whole.failures:
            return whole, None
        budgets = sorted({num_matvecs // p for p in (8, 4, 2)} - set(range(_FEWEST)))
        rows = [*(row(subject, candidate, budget) for budget in budgets), whole]
        return whole, History.of(subject.name, candidate, points_of(rows))

    measures = Measures(measured, TraceRow)
    done = sweep(subjects, trace_estimator, estimators, measures, progress=progress)
    facts = facts_of(subjects, f"tr A from at most {num_matvecs:,} products", numbers)
    return done.comparison("of trace estimators", "RMS error / Σ|λ|", facts, NOTES)


def row_of(subject: Subject, name: str, runs: Sequence[Run[tuple[float, float]]]) -> TraceRow:
    """Errors of all seeds that gave an estimate."""
    found = [run.answer for run in runs if run.answer]
    exact, scale = _truth(subject)
    scale = scale or max((abs(e) for e, _ in found), default=1.0) or 1.0
    errors = [estimate - exact for estimate, _ in found]
    bars = [bar for _, bar in found]
    barred = not any(map(math.isnan, [*bars, exact])) and bool(bars)
    covered = [
        abs(e) <= 2 * bar + subject.rounding * 100 for e, bar in zip(errors, bars, strict=True)
    ]
    coverage = sum(covered) / len(covered) if barred else math.nan
    few = barred and len(covered) >= 10 and coverage < _CALIBRATED
    claim = f"two standard errors cover {coverage:.0%} of the errors"
    return TraceRow(
        subject.name,
        name,
        **common(runs),
        false=(claim,) if few else (),
        false_seeds=len(covered) - sum(covered) if few else 0,
        error=root_mean_square(errors) / scale,
        bias=_bias(errors),
        coverage=coverage,
        stderr=root_mean_square(bars) / scale,
        estimate=Spread.of(estimate for estimate, _ in found),
    )


def _truth(subject: Subject) -> tuple[float, float]:
    """The trace and Σ|λ|; NaN and 0 where they are not known."""
    if not subject.whole or subject.eigenvalues is None:
        return math.nan, 0.0
    return float(subject.eigenvalues.sum()), float(subject.eigenvalues.abs().sum())


def _bias(errors: list[float]) -> float:
    if len(errors) < 3:
        return math.nan
    E = torch.tensor(errors, dtype=torch.float64)
    spread = float(E.std())
    return float(E.mean()) / spread * len(errors) ** 0.5 if spread else math.nan


def root_mean_square(values: Iterable[float]) -> float:
    """NaN of nothing."""
    squares = [v * v for v in values]
    return math.sqrt(sum(squares) / len(squares)) if squares else math.nan


def _number(found: Any) -> tuple[float, float]:
    """An estimate and its standard error, NaN where none is given."""
    if isinstance(found, TraceResult):
        return found.estimate, found.stderr
    pair = found if isinstance(found, tuple) else (found, math.nan)
    if len(pair) != 2:
        raise VectorError(
            f"expected an estimate, or (estimate, standard error), got {len(pair)} values; "
            "return one of these"
        )
    estimate, stderr = float(pair[0]), float(pair[1])
    if not math.isfinite(estimate):
        raise NonFiniteError(f"the estimate is {estimate}; look for it in the estimator")
    return estimate, stderr


NOTES = (
    "All are granted the same products, counted by the matrix, and the same seeds. Errors are root "
    "mean squares over the seeds, relative to Σ|λ|.",
    "A standard error is called false where two of them cover less than 70 % of ten errors and "
    "more.",
    "A point of a history is as many runs with fewer products.",
)
