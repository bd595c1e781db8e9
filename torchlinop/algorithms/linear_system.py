"""Columns of ``(A + damping I) X = B``, iterated together and dropped one by one when done.

A column is done when a product says so, never when a recurrence does: ``b − A x`` is taken before
"converged" is claimed, and iterated on from there if it is too large.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from torchlinop.algorithms.products import Products
from torchlinop.algorithms.right_hand_sides import right_hand_sides
from torchlinop.algorithms.solve_result import SolveResult, Status
from torchlinop.errors import NotConvergedWarning, OptionError, VectorError, warn_caller
from torchlinop.operators.base import CurvatureOperator

_PROGRESS = 0.5  # a restart must halve the residual, or rounding has the last word
_BETWEEN_LOOKS = 50  # iterations, after which recurrences are held against true residuals
_DRIFT = 2.0  # a true residual so much larger than the recurrence's ends the recurrence


@dataclass(frozen=True)
class Iterate:
    """What a method knows of every column; the last axis of every tensor are the columns."""

    X: Tensor  # (n, k)
    residual_norms: Tensor  # (k,) as the recurrence believes
    targets: Tensor  # (k,) of them, where X may stay: the host looks late
    stuck: Tensor  # (k,) bool: no step is left
    noteworthy: Tensor  # (k,) bool: better than what may follow, so that X should be kept
    preconditioner_fails: Tensor  # (k,) bool: r ≠ 0, but rᵀ M r ≤ 0
    curvatures: Tensor  # (k,) pᵀ A p / ‖p‖² of the last direction
    directions: Tensor  # (n, k) p


State = TypeVar("State", bound=Iterate)


@dataclass(frozen=True)
class Method(Generic[State]):
    """A solver as its first iterate and the step to the next. Steps may overwrite what they get."""

    name: str
    start: Callable[[Tensor, Tensor, Tensor], State]  # from X, its residual R, and the targets
    step: Callable[[State], State]
    when_stuck: Status
    monotone: bool  # residuals never grow, but by rounding


@dataclass(frozen=True)
class System:
    """``(A + damping I) X = B``, checked, with what is asked of its solution."""

    A: Products
    B: Tensor  # (n, k)
    M: CurvatureOperator | None  # about the inverse, positive definite
    shape: torch.Size  # of what the caller passed as b
    rtol: float
    max_iter: int

    def precondition(self, R: Tensor) -> Tensor:
        return R if self.M is None else self.M.matmat(R.to(self.M.dtype)).to(R.dtype)


def system(  # noqa: PLR0917  # one for each option of a solver
    op: CurvatureOperator,
    b: Tensor,
    damping: float,
    preconditioner: CurvatureOperator | None,
    rtol: float | None,
    max_iter: int | None,
) -> System:
    """The system, or what is wrong with it."""
    rtol = torch.finfo(op.dtype).eps ** 0.5 if rtol is None else rtol
    max_iter = 1000 if max_iter is None else max_iter
    if not 0 < rtol < 1 or max_iter < 1:
        raise OptionError(
            f"expected rtol between 0 and 1 and max_iter at least 1, got rtol={rtol} and "
            f"max_iter={max_iter}; leave them out for √eps and 1000"
        )
    if preconditioner is not None and preconditioner.space != op.space:
        raise VectorError(
            f"expected a preconditioner on the space of the operator, got {preconditioner!r} for "
            f"{op!r}; build both from the same parameters, dtype and device"
        )
    A = Products(op, damping=damping)
    return System(A, right_hand_sides(A, b), preconditioner, b.shape, rtol, max_iter)


def run(problem: System, method: Method[State]) -> SolveResult:
    """Iterate until every column converged, cannot go on, or used up its iterations."""
    clock = time.perf_counter()
    columns = Columns(problem, method)
    for iteration in range(1, problem.max_iter + 1):
        if not columns.active:
            break
        columns.advance(iteration)
    columns.settle(columns.everywhere(True), columns.everywhere(False), last=True)
    return columns.result(time.perf_counter() - clock)


class Columns(Generic[State]):
    """Which columns still iterate, and what became of the others."""

    def __init__(self, problem: System, method: Method[State]) -> None:
        A, B = problem.A, problem.B
        k = B.shape[1]
        self.problem, self.method = problem, method
        self.X = torch.zeros_like(B)  # the last that products vouch for
        self.sizes = A.norms(B).cpu()
        self.residuals = self.sizes.clone()  # of X
        self.claims = self.sizes.clone()  # true residuals when convergence was last claimed
        self.iterations = torch.zeros(k, dtype=torch.int64)
        self.curvatures = torch.full((k,), torch.nan, dtype=torch.float64)
        self.directions: Tensor | None = None
        self.status: list[Status] = ["converged"] * k
        self.active = self.sizes.nonzero()[:, 0].tolist()  # x = 0 solves for b = 0
        started = (self.sizes > 0).to(B.device)
        targets = (problem.rtol * self.sizes[self.active]).to(B.device)
        self.state = method.start(self.X[:, started], B[:, started], targets)
        self.look = LateLook()

    def everywhere(self, flag: bool) -> Tensor:
        """A flag for every active column."""
        return torch.full((len(self.active),), flag)

    def advance(self, iteration: int) -> None:
        """One step of all active columns; those that seem done are judged, and all at times."""
        self.state = self.method.step(self.state)
        self.iterations[self.active] = iteration
        # ``~(>)`` so that NaN comes to light.
        done = ~(self.state.residual_norms > self.state.targets) | self.state.stuck
        done, noteworthy = self.look(torch.stack([done, self.state.noteworthy]))
        seen = done | noteworthy | (iteration % _BETWEEN_LOOKS == 0)
        if seen.any():
            self.settle(seen, done)
            self.look = LateLook()

    def settle(self, seen: Tensor, done: Tensor, *, last: bool = False) -> None:
        """Judge these of the active columns by true residuals: drop, start anew, or go on."""
        if not seen.any():
            return
        A = self.problem.A
        state = taken(self.state, seen)
        self._refuse_preconditioner(state)
        columns = [i for i, s in zip(self.active, seen.tolist(), strict=True) if s]
        R = self.problem.B[:, columns] - A(state.X)
        norms = A.norms(R).cpu()
        A.refuse_non_finite(norms)
        drifted = norms > _DRIFT * state.residual_norms.cpu()
        better = (norms <= self.residuals[columns]) | (not self.method.monotone)
        worse = ~better & (norms > _DRIFT * self.residuals[columns])
        finished = torch.zeros_like(better)
        for j, i in enumerate(columns):
            norm, claimed = float(norms[j]), bool(done[seen][j])
            if norm <= self.problem.rtol * float(self.sizes[i]):
                self.status[i] = "converged"
            elif bool(state.stuck[j]):
                self.status[i] = self.method.when_stuck
            elif last:
                self.status[i] = "max_iter"
            elif worse[j] or (claimed and norm > _PROGRESS * float(self.claims[i])):
                self.status[i] = "stagnated"
            else:
                self.claims[i] = norm if claimed else self.claims[i]
                continue
            finished[j] = True
            if self.status[i] == "indefinite":
                self._keep_direction(state, j, i)
        improved = [i for i, b in zip(columns, better.tolist(), strict=True) if b]
        self.X[:, improved] = state.X[:, better.to(R.device)]
        self.residuals[improved] = norms[better]
        self._go_on(seen, finished, (drifted | done[seen]) & ~finished, state.X, R)

    def _go_on(
        self, seen: Tensor, finished: Tensor, restarting: Tensor, X: Tensor, R: Tensor
    ) -> None:
        """Start some of the columns seen anew from X with residual R, and drop the finished."""
        if restarting.any():
            where = restarting.to(X.device)
            targets = self.state.targets[seen.to(X.device)][where]
            fresh = self.method.start(X[:, where], R[:, where], targets)
            self.state = replaced(self.state, within(seen, restarting), fresh)
        if finished.any():
            keep = ~within(seen, finished)
            self.state = taken(self.state, keep)
            self.active = [i for i, k in zip(self.active, keep.tolist(), strict=True) if k]

    def _refuse_preconditioner(self, state: State) -> None:
        if self.problem.M is not None and state.preconditioner_fails.any():
            raise OptionError(
                "expected a positive definite preconditioner, but ⟨r, M r⟩ ≤ 0 for "
                f"{self.problem.M!r}; damp it, or leave it out"
            )

    def _keep_direction(self, state: State, j: int, i: int) -> None:
        if self.directions is None:
            self.directions = torch.zeros_like(self.X)
        p = state.directions[:, j : j + 1]
        self.directions[:, i : i + 1] = p / self.problem.A.norms(p).to(p.dtype)
        self.curvatures[i] = state.curvatures[j]

    def result(self, seconds: float) -> SolveResult:
        """What was found; warns of columns that did not converge."""
        problem = self.problem
        relative = torch.where(self.sizes > 0, self.residuals / self.sizes, 0.0)
        converged = torch.tensor([status == "converged" for status in self.status])
        warnings: tuple[str, ...] = ()
        if not converged.all():
            warnings = (_advice(self.status, relative, problem),)
            warn_caller(warnings[0], NotConvergedWarning)
        return SolveResult(
            self.X.reshape(problem.shape),
            self.residuals,
            relative,
            converged,
            self.iterations,
            tuple(self.status),
            None if self.directions is None else self.directions.reshape(problem.shape),
            self.curvatures,
            problem.rtol,
            problem.A.damping,
            self.method.name,
            problem.A.matvecs,
            self.X.dtype,
            seconds,
            warnings,
        )


class LateLook:
    """Flags of the device, read one step late, so that the host never waits for a product."""

    def __init__(self) -> None:
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None

    def __call__(self, flags: Tensor) -> Tensor:
        """These flags if they are on the CPU; else those of the call before, none at first."""
        if not flags.is_cuda:
            return flags
        previous = self._pending
        host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        host.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending = (host, event)
        if previous is None:
            return torch.zeros(flags.shape, dtype=torch.bool)
        previous[1].synchronize()
        return previous[0]


def within(mask: Tensor, part: Tensor) -> Tensor:
    """A mask whose true entries are replaced by those of another, shorter one."""
    whole = mask.clone()
    whole[mask] = part
    return whole


def taken(state: State, columns: Tensor) -> State:
    """The state of these columns, a mask, alone."""
    index = columns.nonzero()[:, 0].to(state.X.device)
    pieces = {name: t.index_select(-1, index) for name, t in _tensors(state)}
    return dataclasses.replace(state, **pieces)


def replaced(state: State, columns: Tensor, fresh: State) -> State:
    """The state with these columns, a mask, taken from another."""
    index = columns.nonzero()[:, 0].to(state.X.device)
    others = dict(_tensors(fresh))
    pieces = {name: t.index_copy(-1, index, others[name]) for name, t in _tensors(state)}
    return dataclasses.replace(state, **pieces)


def _tensors(state: Iterate) -> list[tuple[str, Tensor]]:
    return [(field.name, getattr(state, field.name)) for field in dataclasses.fields(state)]


_ADVICE: dict[Status, str] = {
    "stagnated": "Rounding forbids more: raise rtol or damping, or use a finer dtype",
    "indefinite": 'the matrix is not positive definite: raise damping, or use method="minres"',
    "singular": "The vector b is not in the range of the matrix: raise damping",
    "max_iter": "Raise max_iter or damping, or pass a preconditioner",
}


def _advice(status: list[Status], relative: Tensor, problem: System) -> str:
    failed = [i for i, s in enumerate(status) if s != "converged"]
    worst = max(failed, key=lambda i: float(relative[i]))
    return (
        f"{len(status) - len(failed)} of {len(status)} systems reached rtol={problem.rtol:.1e} "
        f"after {problem.A.matvecs} products; worst residual {float(relative[worst]):.1e} of "
        f"‖b‖ (column {worst}, {status[worst]}). {_ADVICE[status[worst]]}"
    )
