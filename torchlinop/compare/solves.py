"""Linear solvers on the same system, judged by their true residuals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchlinop.algorithms.solve_result import SolveResult
from torchlinop.compare.comparison import Comparison, History
from torchlinop.compare.estimates import Estimated, common, estimated
from torchlinop.compare.registry import Candidate, Wanted, linear_solver
from torchlinop.compare.request import SolveRequest
from torchlinop.compare.rows import COSTS, Column, Row, small
from torchlinop.compare.spread import Spread
from torchlinop.compare.subject import Subject, Truth, subjects_of
from torchlinop.compare.sweep import Measures, facts_of, seeds_of, sweep
from torchlinop.errors import NonFiniteError, OptionError, VectorError

_SLACK = 1.1  # between a claim and the truth
_POINTS = 8  # of a history


@dataclass(frozen=True)
class Solution:
    """An x, and what the solver says of it."""

    x: Tensor  # (n,)
    residual: float = math.nan  # ‖b − A x‖ / ‖b‖, claimed
    converged: bool | None = None  # claimed


@dataclass(frozen=True)
class SolveRow(Row):
    """A linear solver on a matrix, over several right-hand sides."""

    residual: float = math.nan  # the largest ‖b − A x‖ / ‖b‖ of the seeds
    claimed_residual: float = math.nan
    rtol: float = math.nan

    @property
    def accuracy(self) -> float:
        return self.residual

    @property
    def reached(self) -> bool:
        return self.residual <= _SLACK * self.rtol

    @classmethod
    def columns(cls) -> list[Column]:
        return [
            *COSTS,
            Column("residual", lambda r: small(r.residual), "the largest ‖b − A x‖ / ‖b‖"),
            Column(
                "claimed",
                lambda r: small(r.claimed_residual),
                "the same by the solver's own account",
                detail=True,
            ),
        ]


def compare_solves(
    problems: Any,
    b: Tensor | None = None,
    solvers: Iterable[Wanted] | None = None,
    *,
    damping: float = 0.0,
    rtol: float = 1e-6,
    budget: int = 1000,
    seconds: float = 60.0,
    seeds: int | Sequence[int] = 3,
    truth: Truth | Mapping[str, Truth] = None,
    histories: bool = True,
    progress: bool = False,
) -> Comparison:
    """Solve ``(A + damping I) x = b`` to a residual of rtol ‖b‖ by every solver.

    b is a vector (n,), or a Gaussian one of every seed. A solver is a function ``(operator,
    request) -> x`` or Solution, registered by ``@linear_solver("name")``; ``request.b`` is b.
    Residuals are taken by products that do not count, with x rounded to the dtype of the operator.
    Costs and errors: those of `compare`.
    """
    if not 0 < rtol < 1 or budget < 1 or not seconds > 0:
        raise OptionError(
            f"expected rtol from 0 to 1 and a positive budget and seconds, got rtol={rtol}, "
            f"budget={budget}, seconds={seconds}; leave out what you do not mean"
        )
    subjects, numbers = [damped(s, damping) for s in subjects_of(problems, truth)], seeds_of(seeds)

    def asked(subject: Subject, seed: int) -> SolveRequest:
        A = subject.operator
        given = A.space.random(1, seed)[:, 0] if b is None else b
        if given.shape != (A.size,):
            raise VectorError(
                f"expected b of shape ({A.size},), got {tuple(given.shape)}; pass a vector"
            )
        if not 0 < float(torch.linalg.vector_norm(given)) < math.inf:
            raise VectorError("expected a finite b that is not 0; pass another, or leave it out")
        return SolveRequest(given.to(A.dtype).to(A.device), rtol, budget, seconds, seed)

    def run(subject: Subject, candidate: Candidate, request: SolveRequest) -> _Judged:
        def read(found: Any) -> Solution:
            return solution_of(found, request.b)

        done = estimated(subject, candidate, request, read, budget=request.budget, seconds=seconds)
        residual = math.nan if done.answer is None else _residual(subject, request, done.answer)
        return _Judged(done, residual, _rounding(subject, request, done.answer))

    def measured(subject: Subject, candidate: Candidate) -> tuple[SolveRow, History | None]:
        runs = [run(subject, candidate, asked(subject, seed)) for seed in numbers]
        row = _row(subject, candidate.name, runs, rtol)
        if not histories:
            return row, None
        first = asked(subject, numbers[0])
        budgets = np.geomspace(2, max(2, runs[0].run.products), _POINTS).astype(int)[:-1]
        fewer = [replace(first, budget=n) for n in sorted(set(budgets.tolist()))]
        looser = [replace(first, rtol=t) for t in np.geomspace(0.5, rtol, _POINTS)[:-1].tolist()]
        requests = fewer if candidate.budgeted else looser
        points = [*(run(subject, candidate, r) for r in requests), runs[0]]
        return row, _history(subject, candidate, points)

    def refused(problem: str, solver: str, why: str) -> SolveRow:
        return SolveRow(problem, solver, seeds=1, failures=1, failure=why)

    done = sweep(subjects, linear_solver, solvers, Measures(measured, refused), progress=progress)
    limits = f"at most {budget:,} products and {seconds:g} s a run"
    return Comparison(
        "of linear solvers",
        "relative residual",
        tuple(done.rows),
        tuple(done.histories),
        facts_of(subjects, f"(A + {damping:g} I) x = b, rtol {rtol:g}, {limits}", numbers),
        done.left_out,
        rtol,
        NOTES,
        tuple(done.warnings),
    )


@dataclass(frozen=True)
class _Judged:
    run: Estimated[Solution]
    residual: float  # true
    rounding: float  # of a product, in the same measure


def damped(subject: Subject, damping: float) -> Subject:
    """The same with A + damping I."""
    if not damping:
        return subject
    values = None if subject.eigenvalues is None else subject.eigenvalues + damping
    return replace(subject, operator=subject.operator.shift(damping), eigenvalues=values)


def solution_of(found: Any, b: Tensor) -> Solution:
    """What a solver returned, on the device of b and in double precision.

    Raises:
        VectorError: x has another shape; NonFiniteError: NaN in it.
    """
    if isinstance(found, SolveResult):
        found = Solution(
            found.x, float(found.relative_residuals.max()), bool(found.converged.all())
        )
    if not isinstance(found, Solution):
        found = Solution(found)
    x = torch.as_tensor(found.x).detach().to(b.device)
    if x.shape != b.shape:
        raise VectorError(f"expected x of shape {tuple(b.shape)}, got {tuple(x.shape)}; return x")
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError("NaN or infinity in x; look for it in the solver")
    return Solution(x.double(), found.residual, found.converged)


def _residual(subject: Subject, request: SolveRequest, solution: Solution) -> float:
    A, b = subject.operator, request.b.double()
    r = b - A.matvec(solution.x.to(A.dtype)).double()
    return float(torch.linalg.vector_norm(r) / torch.linalg.vector_norm(b))


def _rounding(subject: Subject, request: SolveRequest, solution: Solution | None) -> float:
    """What a right residual may be off by: roundoffs of ‖A‖ ‖x‖, relative to ‖b‖."""
    if solution is None:
        return math.nan
    x, b = (float(torch.linalg.vector_norm(v.double())) for v in (solution.x, request.b))
    return 10 * torch.finfo(subject.operator.dtype).eps + subject.rounding * x / b


def _row(subject: Subject, name: str, runs: Sequence[_Judged], rtol: float) -> SolveRow:
    false = [tuple(_false_claims(judged, rtol)) for judged in runs]
    answers = [j.run.answer for j in runs if j.run.answer]
    claimed = Spread.of(a.residual for a in answers)
    return SolveRow(
        subject.name,
        name,
        **common([judged.run for judged in runs]),
        false=max(false, key=len),
        false_seeds=sum(map(bool, false)),
        residual=Spread.of(judged.residual for judged in runs).most,
        claimed_residual=claimed.most,
        rtol=rtol,
    )


def _false_claims(judged: _Judged, rtol: float) -> list[str]:
    answer, true, rounding = judged.run.answer, judged.residual, judged.rounding
    if answer is None:
        return []
    found = []
    if true > _SLACK * answer.residual + rounding:
        found.append(f"a residual of {true:.0e} is claimed to be {answer.residual:.0e}")
    if answer.converged and true > _SLACK * rtol + rounding:
        found.append(f"called converged with a residual of {true:.0e}")
    return found


def _history(subject: Subject, candidate: Candidate, points: Sequence[_Judged]) -> History:
    of_cost = {p.run.products: p for p in points if not p.run.failure}
    there = [p for _, p in sorted(of_cost.items())]
    return History(
        subject.name,
        candidate.name,
        "budget" if candidate.budgeted else "tolerance",
        tuple(p.run.products for p in there),
        tuple(p.run.seconds for p in there),
        tuple(p.residual for p in there),
    )


NOTES = (
    "All solve for the same b, to ‖b − A x‖ ≤ rtol ‖b‖. Products are counted by the matrix; the "
    "one beyond the budget raises in the solver.",
    "Residuals are taken afterwards by products that do not count. A claim is false where it fails "
    "by more than a tenth and rounding.",
    "A point of a history is a run of its own, with a smaller budget, or, for solvers that take "
    "none, a larger tolerance.",
)
