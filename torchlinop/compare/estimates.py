"""What is shared by comparisons of estimators: runs of all seeds, counted; their failures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torchlinop.compare.attempt import attempt, reason
from torchlinop.compare.registry import Candidate
from torchlinop.compare.spread import Spread
from torchlinop.compare.subject import Subject
from torchlinop.compare.timed_operator import TimedOperator

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Estimated(Generic[Answer]):
    """One seed: what came, in a form that can be judged, and what it cost."""

    answer: Answer | None
    failure: str
    products: int
    calls: int
    seconds: float
    product_seconds: float
    warnings: tuple[str, ...]


def estimated(
    subject: Subject,
    candidate: Candidate,
    request: Any,
    read: Callable[[Any], Answer],
    *,
    budget: int,
    seconds: float,
) -> Estimated[Answer]:
    """Run a solver; ``read`` turns what it returned into an answer, or raises."""
    A = TimedOperator(subject.operator, budget, seconds)
    tried = attempt(lambda: candidate.solve(A, request), A, request.seed)
    answer, failure = None, tried.failure
    if not failure:
        try:
            answer = read(tried.found)
        except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
            failure = reason(error)
    return Estimated(
        answer, failure, A.matvecs, A.matmats, tried.seconds, A.product_seconds, tried.warnings
    )


def common(runs: Sequence[Estimated[Any]]) -> dict[str, Any]:
    """The fields of a row that all kinds have."""
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


def root_mean_square(values: Iterable[float]) -> float:
    """NaN of nothing."""
    squares = [v * v for v in values]
    return math.sqrt(sum(squares) / len(squares)) if squares else math.nan
