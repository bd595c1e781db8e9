"""Runs of one eigensolver on one matrix: an answer judged for every seed, or why there is none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from typing import Any

import numpy as np

from torchlinop.compare.answer import answer_of
from torchlinop.compare.attempt import attempt, reason, seeded
from torchlinop.compare.comparison import History
from torchlinop.compare.eigen_rows import Run
from torchlinop.compare.judge import judge
from torchlinop.compare.memory import Usage, usage_of
from torchlinop.compare.registry import Candidate
from torchlinop.compare.request import Request
from torchlinop.compare.subject import Subject
from torchlinop.compare.timed_operator import SolverHangs, TimedOperator
from torchlinop.errors import TorchlinopError

_POINTS = 8  # of a history, the run itself included


def run(candidate: Candidate, subject: Subject, request: Request) -> Run:
    """One seed."""
    A = _counted(candidate, subject, request)
    tried = attempt(lambda: candidate.solve(A, request), A, request.seed)
    judged, failure = None, tried.failure
    if not failure:
        try:
            answer = answer_of(tried.found, subject.operator.space)
            judged = judge(subject, answer, request) if len(answer) else None
        except TorchlinopError as error:
            failure = reason(error)
        else:
            few = len(answer) < request.k
            failure = f"{len(answer)} of {request.k} pairs" if few else ""
    return Run(
        request.seed,
        A.matvecs,
        A.matmats,
        tried.seconds,
        A.product_seconds,
        judged,
        failure,
        tried.warnings,
    )


def usage(candidate: Candidate, subject: Subject, request: Request) -> Usage:
    """One more run, to measure its memory."""

    def solve(products: Callable[[], AbstractContextManager[object]]) -> None:
        A = _counted(candidate, subject, request, products)
        with seeded(request.seed, A.device), suppress(Exception, SolverHangs):
            candidate.solve(A, request)

    return usage_of(solve, subject.operator, numpy=candidate.on_host)


def history(candidate: Candidate, subject: Subject, request: Request, whole: Run) -> History:
    """Answers of the same solver to smaller budgets, or to larger tolerances if it takes none.

    A run for every point, so that it is what the solver would have answered, and had cost.
    """
    if candidate.own_cost:
        smaller = []  # it answers at once, or not at all
    else:
        smaller = _smaller(request, whole) if candidate.budgeted else _looser(request)
    points = [run(candidate, subject, r) for r in smaller] + [whole]
    of_cost = {p.products: p for p in points}  # of equal costs, the last: it was asked for more
    answered = [
        (p, p.judged.residual) for _, p in sorted(of_cost.items()) if p.judged and not p.failure
    ]
    return History(
        subject.name,
        candidate.name,
        "budget" if candidate.budgeted else "tolerance",
        tuple(p.products for p, _ in answered),
        tuple(p.seconds for p, _ in answered),
        tuple(residual for _, residual in answered),
    )


def _smaller(request: Request, whole: Run) -> list[Request]:
    least = max(1, min(request.k + 1, whole.products))
    budgets = np.geomspace(least, max(whole.products, least), _POINTS).astype(int)[:-1]
    return [replace(request, budget=b) for b in sorted(set(budgets.tolist()))]


def _looser(request: Request) -> list[Request]:
    tolerances = np.geomspace(0.5, request.tol, _POINTS)[:-1]
    return [replace(request, tol=t) for t in tolerances.tolist()]


def _counted(
    candidate: Candidate,
    subject: Subject,
    request: Request,
    products: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> TimedOperator:
    budget = None if candidate.own_cost else request.budget
    return TimedOperator(subject.operator, budget, request.seconds, within=products)
