"""A matrix on which solvers are compared, with what is known of its spectrum."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor

from torchlinop.adapters.scipy import from_linear_operator
from torchlinop.algorithms.lanczos import lanczos
from torchlinop.errors import (
    NonFiniteError,
    OptionError,
    PrecisionWarning,
    TorchlinopError,
    TorchlinopWarning,
)
from torchlinop.operators.base import CurvatureOperator
from torchlinop.operators.check import CheckReport
from torchlinop.operators.hessian import HessianOperator
from torchlinop.signatures import takes
from torchlinop.testing.model_problem import Problem
from torchlinop.testing.problems import EigenProblem
from torchlinop.testing.spectra import wanted

Truth = Tensor | NDArray[Any] | Literal["dense"] | None

_DENSE = 5000  # the largest matrix whose eigenvalues are computed here
_ROUNDOFFS = 10  # of ‖A‖, or times the noise of products: nothing is finer than that


@dataclass(frozen=True)
class Subject:
    """A matrix, its name, its eigenvalues if they are known, and its measured defects."""

    name: str
    operator: CurvatureOperator
    eigenvalues: Tensor | None  # (m,) float64: all, or m of the end that is asked for
    report: CheckReport

    @property
    def whole(self) -> bool:
        """Whether all eigenvalues are known."""
        return self.eigenvalues is not None and len(self.eigenvalues) == self.operator.size

    @property
    def norm(self) -> float:
        """‖A‖, or a lower bound where it is not known."""
        known = [] if self.eigenvalues is None else [float(self.eigenvalues.abs().max())]
        return max([self.report.norm, *known]) or 1.0

    @property
    def rounding(self) -> float:
        """Differences below are those of products."""
        eps = torch.finfo(self.operator.dtype).eps
        return _ROUNDOFFS * max(eps, self.report.noise) * self.norm

    @property
    def symmetric(self) -> bool:
        return self.report.symmetry <= self.report.bounds[1]

    @property
    def asymmetry(self) -> str:
        """What a solver for symmetric matrices is refused with, if the matrix is not symmetric."""
        if self.symmetric:
            return ""
        return (
            f"the matrix is not symmetric: |<u,Av>-<Au,v>| = {self.report.symmetry:.0e} of the "
            f"products, rounding {self.report.noise:.0e}"
        )

    @property
    def warnings(self) -> list[str]:
        """What is wrong with the matrix, beside its symmetry."""
        repeatable, _, linear = self.report.bounds
        defects = [
            (self.report.repeatability, repeatable, "two products of one vector differ by"),
            (self.report.linearity, linear, "the product is not linear, by"),
        ]
        return [
            f"{self.name}: {what} {defect:.0e} of their size; solvers may be blamed for it"
            for defect, bound, what in defects
            if defect > bound
        ]

    @property
    def knowledge(self) -> str:
        """What is known of the spectrum, for the head of a table."""
        if self.eigenvalues is None:
            return ", eigenvalues unknown"
        known = "all" if self.whole else f"{len(self.eigenvalues):,}"
        return f", {known} eigenvalues known"

    def wanted(self, k: int, which: str) -> Tensor | None:
        """The k eigenvalues wanted, the most wanted first, copies counted; None if unknown."""
        known = self.eigenvalues
        return None if known is None or len(known) < k else wanted(known, which, k)

    def smallest(self, k: int, which: str) -> float:
        """|λ| of the last of them; if unknown, about that, by products that nobody counts."""
        exact = self.wanted(k, which)
        if exact is None:
            exact = self._about(k, which)
        return float(exact.abs().min()) or torch.finfo(torch.float64).tiny

    def largest(self) -> float:
        """‖A‖; if unknown, about that, by products that nobody counts."""
        return self.norm if self.whole else max(self.norm, float(self._about(1, "LM").abs().max()))

    def _about(self, k: int, which: str) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TorchlinopWarning)
            try:
                return lanczos(self.operator, k, which=which, tol=1e-2).eigenvalues  # type: ignore[arg-type]
            except TorchlinopError:  # of a matrix that is not symmetric, or not fixed
                return torch.tensor([self.norm])


def subjects_of(problems: Any, truth: Truth | Mapping[str, Truth] = None) -> list[Subject]:
    """The matrices of a problem, or of a mapping from names to problems.

    A problem is a symmetric operator of this library, of SciPy, CuPy or a dense array; one of
    ``torchlinop.testing.problem``, with its eigenvalues; one of ``torchlinop.testing.gallery``,
    whose Hessian is taken; or a function that returns one.
    Each takes six products, to see that it is a fixed symmetric matrix.

    ``truth`` is the eigenvalues (n,), or those of the end wanted; ``"dense"`` computes all;
    without it, the attribute ``eigenvalues`` (n,) of an operator is taken, if there is one.

    Raises:
        NonFiniteError: products hold NaN. OptionError: no such problem or truth.
    """
    if not isinstance(problems, Mapping):
        problems = {"": problems}
    if not problems:
        raise OptionError("expected at least one problem, got an empty mapping; pass an operator")
    truths = truth if isinstance(truth, Mapping) else dict.fromkeys(problems, truth)
    if unknown := set(truths) - set(problems):
        raise OptionError(
            f"expected truth by the names of problems, {', '.join(map(repr, problems))}, got "
            f"{', '.join(map(repr, unknown))}; give the same names"
        )
    return [_subject(str(name), problem, truths.get(name)) for name, problem in problems.items()]


def _subject(name: str, problem: Any, truth: Truth) -> Subject:
    problem = _returned(problem)
    if isinstance(problem, EigenProblem):
        name = name or problem.name
        truth = problem.eigenvalues if truth is None else truth
    operator = operator_of(problem)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrecisionWarning)
        report = operator.check()
    if not report.finite:
        raise NonFiniteError(
            f"the products of {operator!r} hold NaN or infinity, so that there is nothing to "
            "compare; look for them in the data and the parameters"
        )
    return Subject(name or type(operator).__name__, operator, _spectrum(operator, truth), report)


def operator_of(problem: Any) -> CurvatureOperator:
    """The symmetric operator that is meant."""
    problem = _returned(problem)
    if isinstance(problem, EigenProblem):
        return problem.operator
    if isinstance(problem, Problem):
        return HessianOperator(problem.model, problem.batches, problem.loss_fn)
    if isinstance(problem, CurvatureOperator):
        return problem
    if not hasattr(problem, "shape"):
        raise OptionError(
            f"expected an operator, got {type(problem).__name__}; pass an operator, an array, a "
            "problem of the gallery, a function that builds one, or a dict of these"
        )
    return from_linear_operator(problem)


def _returned(problem: Any) -> Any:
    """What a function returns, or what is no function."""
    if not callable(problem) or hasattr(problem, "shape"):
        return problem
    if not takes(problem, 0, unknown=False):
        raise OptionError(
            f"expected an operator, or a function without arguments that builds one, got "
            f"{type(problem).__name__}; for a product of vectors pass LambdaOperator(n, product)"
        )
    return _returned(problem())


def _spectrum(operator: CurvatureOperator, truth: Truth) -> Tensor | None:
    if isinstance(truth, str):
        if truth != "dense" or operator.size > _DENSE:
            raise OptionError(
                f'expected truth to be eigenvalues or "dense", for n up to {_DENSE:,}, got '
                f"{truth!r} for n = {operator.size:,}; leave it out"
            )
        values: Tensor = torch.linalg.eigvalsh(operator.to_dense().double())
        return values.cpu()
    if truth is None:
        own = getattr(operator, "eigenvalues", None)
        if not isinstance(own, Tensor) or own.shape != (operator.size,):
            return None
        truth = own
    known = torch.as_tensor(truth).detach().double().cpu()
    if known.ndim != 1 or len(known) > operator.size or not bool(known.isfinite().all()):
        raise OptionError(
            f"expected at most {operator.size:,} true eigenvalues, got a tensor of shape "
            f"{tuple(known.shape)}, or NaN in it; pass a vector"
        )
    return known
