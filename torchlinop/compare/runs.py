"""One run of one solver on one matrix: what came of it, judged, and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torchlinop.compare.attempt import attempt, reason
from torchlinop.compare.registry import Candidate
from torchlinop.compare.spread import Spread
from torchlinop.compare.subject import Subject
from torchlinop.compare.timed_operator import TimedOperator

Judged = TypeVar("Judged")


@dataclass(frozen=True)
class Run(Generic[Judged]):
    """One seed."""

    answer: Judged | None  # what it is worth; None if there is none
    failure: str  # why there is none, or too little
    products: int
    calls: int
    seconds: float
    product_seconds: float
    warnings: tuple[str, ...]
    hung: bool = False  # had to be interrupted


def run_of(
    subject: Subject,
    candidate: Candidate,
    request: Any,
    read: Callable[[Any], Judged | None],
    *,
    budget: int | None,
    seconds: float,
) -> Run[Judged]:
    """Run a solver; ``read`` judges what it returned, or raises."""
    A = TimedOperator(subject.operator, budget, seconds)
    tried = attempt(lambda: candidate.solve(A, request), A, request.seed)
    answer, failure = None, tried.failure
    if not failure:
        try:
            answer = read(tried.found)
        except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
            failure = reason(error)
    costs = A.matvecs, A.matmats, tried.seconds, A.product_seconds
    return Run(answer, failure, *costs, tried.warnings, A.left_alone)


def common(runs: Sequence[Run[Any]]) -> dict[str, Any]:
    """The fields that rows of all kinds have."""
    failures = [run.failure for run in runs if run.failure]
    return {
        "seeds": len(runs),
        "failures": len(failures),
        "failure": failures[0] if failures else "",
        "warnings": tuple(dict.fromkeys(w for run in runs for w in run.warnings)),
        "products": Spread.of(run.products for run in runs),
        "calls": Spread.of(run.calls for run in runs),
        "seconds": Spread.of(run.seconds for run in runs),
        "product_seconds": Spread.of(run.product_seconds for run in runs),
    }
