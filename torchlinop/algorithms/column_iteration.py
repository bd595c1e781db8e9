"""Columns of ``(A + damping I) X = B``, iterated together and dropped one by one when done.

A column is done when a product says so, never when a recurrence does: ``b − A x`` is taken before
"converged" is claimed, and iterated on from there if it is too large.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Generic

import torch
from torch import Tensor

from torchlinop.algorithms.dynamic_range import refuse_range
from torchlinop.algorithms.given_operator import refuse_no_operator
from torchlinop.algorithms.iterates import Method, State, replaced, taken, within
from torchlinop.algorithms.late_look import LateLook
from torchlinop.algorithms.linear_system import System
from torchlinop.algorithms.right_hand_sides import right_hand_sides
from torchlinop.algorithms.sizes import refuse_fractions, refuse_non_numbers, refuse_run
from torchlinop.algorithms.solve_result import SolveResult, Status, advice
from torchlinop.algorithms.symmetric_run import symmetric_run
from torchlinop.errors import (
    NotConvergedError,
    NotConvergedWarning,
    OptionError,
    VectorError,
    warn_caller,
)
from torchlinop.operators.base import CurvatureOperator

_PROGRESS = 0.5  # a restart must halve the residual, or rounding has the last word
_BETWEEN_LOOKS = 50  # iterations, after which recurrences are held against true residuals
_DRIFT = 2.0  # a true residual so much larger than the recurrence's ends the recurrence


def solve_by(
    method_of: Callable[[System], Method[State]],
    op: CurvatureOperator,
    b: Tensor,
    *,
    damping: float = 0.0,
    preconditioner: CurvatureOperator | None = None,
    rtol: float | None = None,
    max_iter: int | None = None,
    max_seconds: float = math.inf,
    progress: bool = False,
    strict: bool = False,
) -> SolveResult:
    """Iterate by this method until every column converged, cannot go on, or was stopped.

    Raises:
        VectorError: b or the preconditioner is not of this space.
        OptionError: no such tolerance; the preconditioner is not positive definite.
        NonFiniteError: b or products hold NaN or infinity; MemoryEstimateError: memory ran out.
        SymmetryError: A is not symmetric, or its products do not repeat.
        NotConvergedError: by strict=True, where others warn.
    """
    refuse_run(damping, max_seconds)
    rtol, max_iter = checked_limits(op, rtol, max_iter, preconditioner)
    with symmetric_run(op, damping=damping, max_seconds=max_seconds, progress=progress) as A:
        B, units = right_hand_sides(A, b)
        problem = System(A, B, units, preconditioner, b.shape, rtol, max_iter)
        columns = Columns(problem, method_of(problem))
        ended = columns.iterate()
        columns.settle(columns.everywhere(True), columns.everywhere(False), ended)
        return columns.result(strict=strict)


def checked_limits(
    op: CurvatureOperator,
    rtol: float | None,
    max_iter: int | None,
    preconditioner: CurvatureOperator | None,
) -> tuple[float, int]:
    """The tolerance and the iterations, as given or as usual.

    Raises:
        OptionError: no such tolerance or number; VectorError: a preconditioner of another space.
    """
    refuse_no_operator(op)
    rtol = torch.finfo(op.dtype).eps ** 0.5 if rtol is None else rtol
    max_iter = 1000 if max_iter is None else max_iter
    refuse_fractions(max_iter=max_iter)
    refuse_non_numbers(rtol=rtol)
    if not 0 < rtol < 1 or max_iter < 1:
        raise OptionError(
            f"expected rtol between 0 and 1 and max_iter at least 1, got rtol={rtol} and "
            f"max_iter={max_iter}; leave them out for √eps and 1000"
        )
    if preconditioner is None:
        return rtol, max_iter
    refuse_no_operator(preconditioner, "preconditioner")
    if preconditioner.space != op.space:
        raise VectorError(
            f"expected a preconditioner on the space of the operator, got {preconditioner!r} for "
            f"{op!r}; build both from the same parameters, dtype and device"
        )
    return rtol, max_iter


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
        zeros = torch.zeros_like(targets)
        self.state = method.start(self.X[:, started], B[:, started], targets, zeros)
        self.look = LateLook()

    def everywhere(self, flag: bool) -> Tensor:
        """A flag for every active column."""
        return torch.full((len(self.active),), flag)

    def iterate(self) -> Status:
        """Until no column is active, or what ended it before."""
        try:
            for iteration in range(1, self.problem.max_iter + 1):
                if not self.active:
                    break
                if iteration > 1 and self.problem.A.late:
                    return "maxseconds"
                self.advance(iteration)
        except KeyboardInterrupt:
            if not self.problem.A.matvecs:
                raise
            return "interrupted"
        return "max_iter"

    def advance(self, iteration: int) -> None:
        """One step of all active columns; those that seem done are judged, and all at times."""
        self.state = self.method.step(self.state)
        self.iterations[self.active] = iteration
        # ``~(>)`` so that NaN comes to light.
        done = ~(self.state.residual_norms > self.state.targets) | self.state.stuck
        done, doubtful = self.look(torch.stack([done, self.state.doubtful]))
        seen = done | doubtful | (iteration % _BETWEEN_LOOKS == 0)
        if seen.any():
            self.settle(seen, done)
            self.look = LateLook()

    def settle(self, seen: Tensor, done: Tensor, ended: Status | None = None) -> None:
        """Judge these of the active columns by true residuals: drop, start anew, or go on."""
        if not seen.any():
            return
        A = self.problem.A
        state, claimed = taken(self.state, seen), done[seen]
        self._refuse_preconditioner(state)
        columns = [i for i, s in zip(self.active, seen.tolist(), strict=True) if s]
        X, R = state.X, self.problem.B[:, columns] - A(state.X)
        norms = A.norms(R).cpu()
        A.refuse_non_finite(norms)
        refuse_range(A, float(state.scale.max()))
        drifted = norms > _DRIFT * state.residual_norms.cpu()
        short = norms > self.problem.rtol * self.sizes[columns]
        stuck = state.stuck.cpu()
        hopeless = stuck | (claimed & (norms > _PROGRESS * self.claims[columns]))
        better = (norms <= self.residuals[columns]) | (not self.method.monotone)
        hopeless |= ~better & (norms > _DRIFT * self.residuals[columns])
        doubted = hopeless | drifted | state.doubtful.cpu()
        singular = self._least_squares(state, columns, short & doubted, X, R)
        if singular.any():
            norms, better = A.norms(R).cpu(), better | singular
        finished = ~short | hopeless | singular | (ended is not None)
        for j in finished.nonzero()[:, 0].tolist():
            self.status[columns[j]] = self._verdict(
                bool(short[j]), bool(singular[j]), bool(stuck[j]), bool(hopeless[j]), ended
            )
            self._keep_direction(state, j, columns[j])
        index = torch.tensor(columns)
        self.claims[index[claimed]] = norms[claimed]
        self.X[:, index[better].to(X.device)] = X[:, better.to(X.device)]
        self.residuals[index[better]] = norms[better]
        self._go_on(seen, finished, (drifted | claimed) & ~finished, X, R)

    def _verdict(
        self, short: bool, singular: bool, stuck: bool, hopeless: bool, ended: Status | None
    ) -> Status:
        if not short:
            return "converged"
        if singular:
            return "singular"
        if stuck:
            return self.method.when_stuck
        return "stagnated" if hopeless or ended is None else ended

    def _least_squares(
        self, state: State, columns: list[int], where: Tensor, X: Tensor, R: Tensor
    ) -> Tensor:
        """Which of these columns have a residual orthogonal to the range of A, up to rounding.

        Their shortest solution of least squares and its residual are written into X and R. Costs
        two products a column where the recurrence believes it, and none elsewhere.
        """
        flat = self.method.flat
        where = where & (state.flatness.cpu() <= flat)
        if not where.any():
            return where
        A = self.problem.A
        index = where.nonzero()[:, 0].to(X.device)
        Y = state.fallback[:, index]
        S = self.problem.B[:, torch.tensor(columns)[where].to(X.device)] - A(Y)
        AS, sizes = A(S), A.norms(S)
        orthogonal = A.norms(AS) <= flat * state.scale[index] * sizes
        if self.problem.M is None:
            # What y has of the kernel of A is along s: Liu, Milzarek and Roosta 2022.
            along = (A.dots(S, Y) / sizes**2).to(Y.dtype)
            lifted = S + AS * along
            harmless = A.norms(lifted) <= (1 + flat) * sizes
            Y, S = torch.where(harmless, Y - S * along, Y), torch.where(harmless, lifted, S)
        X[:, index[orthogonal]], R[:, index[orthogonal]] = Y[:, orthogonal], S[:, orthogonal]
        return within(where, orthogonal.cpu())

    def _go_on(
        self, seen: Tensor, finished: Tensor, restarting: Tensor, X: Tensor, R: Tensor
    ) -> None:
        """Start some of the columns seen anew from X with residual R, and drop the finished."""
        if restarting.any():
            where = restarting.to(X.device)
            targets, scale = (
                t[seen.to(X.device)][where] for t in (self.state.targets, self.state.scale)
            )
            fresh = self.method.start(X[:, where], R[:, where], targets, scale)
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
        if self.status[i] != "indefinite":
            return
        if self.directions is None:
            self.directions = torch.zeros_like(self.X)
        p = state.directions[:, j : j + 1]
        self.directions[:, i : i + 1] = p / self.problem.A.norms(p).to(p.dtype)
        self.curvatures[i] = state.curvatures[j]

    def result(self, *, strict: bool) -> SolveResult:
        """What was found; warns of columns that did not converge, or raises."""
        problem = self.problem
        relative = torch.where(self.sizes > 0, self.residuals / self.sizes, 0.0)
        converged = torch.tensor([status == "converged" for status in self.status])
        warnings = advice(self.status, relative, problem.rtol, problem.A.matvecs)
        result = SolveResult(
            (self.X * problem.units.to(self.X)).reshape(problem.shape),
            self.residuals * problem.units,
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
            problem.A.seconds,
            warnings,
        )
        if warnings and strict:
            raise NotConvergedError(warnings[0], result)
        for warning in warnings:
            warn_caller(warning, NotConvergedWarning)
        return result
