"""Runs of one eigensolver on one matrix: for every seed, for its memory, and for its history."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from typing import Any

import numpy as np

from torchlinop.compare.answer import answer_of
from torchlinop.compare.attempt import seeded
from torchlinop.compare.history import History
from torchlinop.compare.judge import Judged, judge
from torchlinop.compare.memory import Usage, usage_of
from torchlinop.compare.registry import Candidate
from torchlinop.compare.request import Request
from torchlinop.compare.runs import Run, run_of
from torchlinop.compare.subject import Subject
from torchlinop.compare.timed_operator import SolverHangs, TimedOperator
from torchlinop.compare.watch import watched

_POINTS = 8  # of a history, the run itself included


def run(candidate: Candidate, subject: Subject, request: Request) -> Run[Judged]:
    """One seed. What has fewer pairs than wanted is judged, and a failure all the same."""

    def read(found: Any) -> Judged | None:
        answer = answer_of(found, subject.operator.space)
        return judge(subject, answer, request) if len(answer) else None

    budget = _budget(candidate, request)
    done = run_of(subject, candidate, request, read, budget=budget, seconds=request.seconds)
    pairs = done.answer.pairs if done.answer else 0
    if done.failure or pairs == request.k:
        return done
    return replace(done, failure=f"{pairs} of {request.k} pairs")


def usage(candidate: Candidate, subject: Subject, request: Request) -> Usage:
    """One more run, to measure its memory."""

    def solve(products: Callable[[], AbstractContextManager[object]]) -> None:
        budget = _budget(candidate, request)
        A = TimedOperator(subject.operator, budget, request.seconds, within=products)
        with seeded(request.seed, A.device), suppress(Exception, SolverHangs):
            watched(lambda: candidate.solve(A, request), A)

    return usage_of(solve, subject.operator, numpy=candidate.on_host)


def history(
    candidate: Candidate, subject: Subject, request: Request, whole: Run[Judged]
) -> History:
    """Answers of the same solver to smaller budgets, or to larger tolerances if it takes none.

    A run for every point, so that it is what the solver would have answered, and had cost.
    """
    if candidate.own_cost:
        smaller = []  # it answers at once, or not at all
    else:
        smaller = _smaller(request, whole) if candidate.budgeted else _looser(request)
    runs = [run(candidate, subject, r) for r in smaller] + [whole]
    points = [
        (r.products, r.seconds, r.answer.residual) for r in runs if r.answer and not r.failure
    ]
    return History.of(subject.name, candidate, points)


def _smaller(request: Request, whole: Run[Judged]) -> list[Request]:
    least = max(1, min(request.k + 1, whole.products))
    budgets = np.geomspace(least, max(whole.products, least), _POINTS).astype(int)[:-1]
    return [replace(request, budget=b) for b in sorted(set(budgets.tolist()))]


def _looser(request: Request) -> list[Request]:
    tolerances = np.geomspace(0.5, request.tol, _POINTS)[:-1]
    return [replace(request, tol=t) for t in tolerances.tolist()]


def _budget(candidate: Candidate, request: Request) -> int | None:
    return None if candidate.own_cost else request.budget
