"""Eigensolvers on the same matrix, asked for the same pairs, and judged by the same products."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, get_args

import torch

from torchlinop.choices import refuse_unknown
from torchlinop.compare.comparison import Comparison
from torchlinop.compare.eigen_rows import EigenRow
from torchlinop.compare.eigen_runs import history, run, usage
from torchlinop.compare.history import History
from torchlinop.compare.registry import Candidate, Wanted, eigensolver
from torchlinop.compare.request import End, Request
from torchlinop.compare.subject import Subject, Truth, subjects_of
from torchlinop.compare.sweep import Measures, facts_of, seeds_of, sweep
from torchlinop.errors import OptionError

_PRODUCTS_A_PAIR = 100


def compare(
    problems: Any,
    k: int = 10,
    which: End = "LA",
    solvers: Iterable[Wanted] | None = None,
    *,
    tol: float | None = None,
    budget: int | None = None,
    seconds: float = 60.0,
    seeds: int | Sequence[int] = 3,
    truth: Truth | Mapping[str, Truth] = None,
    histories: bool = True,
    memory: bool = True,
    progress: bool = False,
) -> Comparison:
    """Run eigensolvers on the same counted matrix, and judge their answers by products of it.

    Every solver is asked for the k pairs at one end, with ‖A x − λ x‖ ≤ tol |λ|, from the same
    start where it takes one. Residuals, orthogonality and, where the spectrum is known, errors,
    ghosts and missed eigenvalues are measured here in float64, never taken from the solver. What
    a solver raises, returns in another form or claims wrongly is a row with its reason.

    Costs all that the solvers take, times ``seeds`` and one more for the memory, and about four
    times that of one seed for the histories; and 6 + k products a problem and answer to judge it.
    Ctrl-C returns the rows there are.

    Args:
        problems: an operator of this library, of SciPy or CuPy, an array, a problem of
            ``torchlinop.testing``, a function that builds one, or a dict of these.
        k: how many pairs.
        which: ``"LA"`` largest, ``"SA"`` smallest, ``"LM"`` largest |λ|.
        solvers: names, patterns such as ``"scipy*"``, or functions ``(operator, request) ->
            (values, vectors)``; all registered ones that suit unless given.
        tol: relative to the eigenvalue; 1e-6, in float32 1e-4, unless given.
        budget: products a run, 100 k unless given. The one beyond it raises in the solver.
        seconds: a run, likewise, at the next product. A solver that makes none for as long is
            interrupted, at the next line of Python that it comes to.
        seeds: how many, or which.
        truth: the eigenvalues (n,), or those wanted; ``"dense"`` computes them by n products; a
            dict of these by problem. ``operator.eigenvalues`` unless given, if there is such.
        histories: run again with smaller budgets, or larger tolerances, to see the convergence.
        memory: run once more to measure what is held at once.
        progress: show a bar, on a terminal.

    Raises:
        OptionError: unknown solver or which; k, tol, budget or seeds that are not positive.
        NonFiniteError: products hold NaN. SymmetryError: the matrix is not symmetric, and no
            solver chosen takes such.

    Example:
        >>> from torchlinop.testing import RotatedOperator, spectra
        >>> A = RotatedOperator(spectra.neural(200))  # knows its eigenvalues
        >>> found = compare(A, k=3, solvers=["torchlinop lanczos", "scipy eigsh"], seeds=1)
        >>> [row.verdict for row in found.rows]
        ['ok', 'ok']
    """
    _refuse(k, which, tol, budget, seconds)
    subjects, numbers = subjects_of(problems, truth), seeds_of(seeds)
    products = _PRODUCTS_A_PAIR * k if budget is None else budget
    requests = {
        s.name: _request(s, k, which, tol, budget=products, seconds=seconds) for s in subjects
    }

    def measured(subject: Subject, candidate: Candidate) -> tuple[EigenRow, History | None]:
        request = requests[subject.name]
        first = request.of_seed(numbers[0])
        runs = [run(candidate, subject, request.of_seed(seed)) for seed in numbers]
        ends = not any(r.hung for r in runs)
        held = usage(candidate, subject, first) if memory and ends else None
        row = EigenRow.of(
            subject.name,
            candidate.name,
            runs,
            k=k,
            tolerated=max(1e-3, 10 * request.tol) if subject.symmetric else math.inf,
            usage=held,
            vector=subject.operator.size * subject.operator.dtype.itemsize,
        )
        return row, history(candidate, subject, first, runs[0]) if histories and ends else None

    measures = Measures(measured, partial(EigenRow, k=k), which)
    done = sweep(subjects, eigensolver, solvers, measures, progress=progress)
    tols = ", ".join(dict.fromkeys(f"{r.tol:g}" for r in requests.values()))
    asked = f"{k} pairs, {which}, tol {tols}, at most {products:,} products and {seconds:g} s a run"
    facts, target = facts_of(subjects, asked, numbers), max(r.tol for r in requests.values())
    return done.comparison("of eigensolvers", "largest relative residual", facts, NOTES, target)


def _refuse(k: int, which: str, tol: float | None, budget: int | None, seconds: float) -> None:
    refuse_unknown("which", which, get_args(End))
    if tol is not None and not 0 < tol < 1:
        raise OptionError(f"expected tol from 0 to 1, relative to |λ|, got {tol}; leave it out")
    if k < 1 or not seconds > 0 or (budget is not None and budget < k):
        raise OptionError(
            "expected k and seconds to be positive and budget to be at least k, got "
            f"k={k}, seconds={seconds}, budget={budget}; leave out what you do not mean"
        )


def _request(
    subject: Subject, k: int, which: End, tol: float | None, *, budget: int, seconds: float
) -> Request:
    if k >= subject.operator.size:
        raise OptionError(
            f"expected k below n = {subject.operator.size:,}, got {k}; for all eigenvalues of a "
            "small matrix take torch.linalg.eigh(op.to_dense())"
        )
    usual = 1e-6 if torch.finfo(subject.operator.dtype).eps < 1e-12 else 1e-4
    return Request(
        k,
        which,
        usual if tol is None else tol,
        budget,
        seconds,
        smallest=subject.smallest(k, which),
        norm=subject.largest(),
    )


NOTES = (
    "All are asked for the same pairs, with a residual ‖A x − λ x‖ of at most tol |λ|, from the "
    "same Gaussian start where they take one; solvers whose tol is absolute, or relative to ‖A‖, "
    "are given what amounts to it for the last pair.",
    "Products are counted by the matrix. The one beyond the budget, in products or seconds, raises "
    "in the solver; one that makes no product for as many seconds is interrupted.",
    "Residuals, orthogonality, errors, ghosts and missed eigenvalues are measured afterwards, in "
    "float64, by products that do not count. Costs are medians of the seeds, with the range in "
    "parentheses; accuracy is that of the worst seed.",
    "A claim is false where it fails by more than a tenth and ten roundoffs of ‖A‖. An "
    "answer of small residuals is wrong all the same where eigenvalues are missing, or where max "
    "|XᵀX − I| is more than 1e-3, and than 10 tol.",
    "Memory is that of one more run. On the CPU: arrays of at least half a vector, of torch after "
    "every operation, of NumPy at products 1, 2, 4, 8 and so on.",
    "A point of a history is a run of its own, with a smaller budget, or, for solvers that take "
    "none, a larger tolerance: what the solver would have answered, and what that had cost.",
)
