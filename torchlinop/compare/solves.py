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
from torchlinop.compare.comparison import Comparison
from torchlinop.compare.history import History
from torchlinop.compare.registry import Candidate, Wanted, linear_solver
from torchlinop.compare.request import SolveRequest
from torchlinop.compare.rows import CLAIMED_RESIDUAL, COSTS, Column, Row, small
from torchlinop.compare.runs import Run, common, run_of
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
            CLAIMED_RESIDUAL,
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

    def run(subject: Subject, candidate: Candidate, request: SolveRequest) -> Run[_Judged]:
        def read(found: Any) -> _Judged:
            return _judged(subject, request, solution_of(found, request.b))

        return run_of(subject, candidate, request, read, budget=request.budget, seconds=seconds)

    def measured(subject: Subject, candidate: Candidate) -> tuple[SolveRow, History | None]:
        runs = [run(subject, candidate, asked(subject, seed)) for seed in numbers]
        row = _row(subject, candidate.name, runs, rtol)
        if not histories or any(r.hung for r in runs):
            return row, None
        first = asked(subject, numbers[0])
        budgets = np.geomspace(2, max(2, runs[0].products), _POINTS).astype(int)[:-1]
        fewer = [replace(first, budget=n) for n in sorted(set(budgets.tolist()))]
        looser = [replace(first, rtol=t) for t in np.geomspace(0.5, rtol, _POINTS)[:-1].tolist()]
        requests = fewer if candidate.budgeted else looser
        tried = [*(run(subject, candidate, r) for r in requests), runs[0]]
        points = [(r.products, r.seconds, r.answer.residual) for r in tried if r.answer]
        return row, History.of(subject.name, candidate, points)

    measures = Measures(measured, SolveRow)
    done = sweep(subjects, linear_solver, solvers, measures, progress=progress)
    limits = f"at most {budget:,} products and {seconds:g} s a run"
    facts = facts_of(subjects, f"(A + {damping:g} I) x = b, rtol {rtol:g}, {limits}", numbers)
    return done.comparison("of linear solvers", "relative residual", facts, NOTES, rtol)


@dataclass(frozen=True)
class _Judged:
    said: Solution
    residual: float  # true
    rounding: float  # what a right residual may be off by


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


def _judged(subject: Subject, request: SolveRequest, solution: Solution) -> _Judged:
    """Its residual by one more product, which rounds by roundoffs of ‖A‖ ‖x‖ / ‖b‖."""
    A, b, x = subject.operator, request.b.double(), solution.x
    r = b - A.matvec(x.to(A.dtype)).double()
    r_norm, x_norm, b_norm = (float(torch.linalg.vector_norm(v)) for v in (r, x, b))
    rounding = 10 * torch.finfo(A.dtype).eps + subject.rounding * x_norm / b_norm
    return _Judged(solution, r_norm / b_norm, rounding)


def _row(subject: Subject, name: str, runs: Sequence[Run[_Judged]], rtol: float) -> SolveRow:
    judged = [run.answer for run in runs if run.answer]
    false = [tuple(_false_claims(j, rtol)) for j in judged]
    claimed = Spread.of(j.said.residual for j in judged)
    return SolveRow(
        subject.name,
        name,
        **common(runs),
        false=max(false, key=len, default=()),
        false_seeds=sum(map(bool, false)),
        residual=Spread.of(j.residual for j in judged).most,
        claimed_residual=claimed.most,
        rtol=rtol,
    )


def _false_claims(judged: _Judged, rtol: float) -> list[str]:
    said, true, rounding = judged.said, judged.residual, judged.rounding
    found = []
    if true > _SLACK * said.residual + rounding:
        found.append(f"a residual of {true:.0e} is claimed to be {said.residual:.0e}")
    if said.converged and true > _SLACK * rtol + rounding:
        found.append(f"called converged with a residual of {true:.0e}")
    return found


NOTES = (
    "All solve for the same b, to ‖b − A x‖ ≤ rtol ‖b‖. Products are counted by the matrix; the "
    "one beyond the budget raises in the solver.",
    "Residuals are taken afterwards by products that do not count. A claim is false where it fails "
    "by more than a tenth and rounding.",
    "A point of a history is a run of its own, with a smaller budget, or, for solvers that take "
    "none, a larger tolerance.",
)
