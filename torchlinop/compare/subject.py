"""A matrix on which solvers are compared, with what is known of its spectrum."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
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
from torchlinop.testing.gallery import Problem
from torchlinop.testing.spectra import wanted

Truth = Tensor | Literal["dense"] | None

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

    def _about(self, k: int, which: str) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TorchlinopWarning)
            try:
                return lanczos(self.operator, k, which=which, tol=1e-2).eigenvalues  # type: ignore[arg-type]
            except TorchlinopError:  # of a matrix that is not symmetric, or not fixed
                return torch.tensor([self.norm])


def subjects_of(problems: Any, truth: Truth | Mapping[str, Truth] = None) -> list[Subject]:
    """The matrices of a problem, or of a mapping from names to problems.

    A problem is a symmetric operator of this library, of SciPy, CuPy or a dense array; a problem
    of ``torchlinop.testing.gallery``, whose Hessian is taken; or a function that returns one.
    Each takes six products, to see that it is a fixed symmetric matrix.

    ``truth`` is the eigenvalues (n,), or those of the end wanted; ``"dense"`` computes all;
    without it, the attribute ``eigenvalues`` of an operator is taken, if there is one.

    Raises:
        NonFiniteError: products hold NaN. OptionError: no such problem or truth.
    """
    if not isinstance(problems, Mapping):
        problems = {"": problems}
    if not problems:
        raise OptionError("expected at least one problem, got an empty mapping; pass an operator")
    truths = truth if isinstance(truth, Mapping) else dict.fromkeys(problems, truth)
    return [_subject(name, problem, truths.get(name)) for name, problem in problems.items()]


def _subject(name: str, problem: Any, truth: Truth) -> Subject:
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
    if isinstance(problem, Problem):
        return HessianOperator(problem.model, problem.batches, problem.loss_fn)
    if isinstance(problem, CurvatureOperator):
        return problem
    if isinstance(problem, Callable) and not hasattr(problem, "shape"):  # type: ignore[arg-type]
        return operator_of(problem())
    if not hasattr(problem, "shape"):
        raise OptionError(
            f"expected an operator, got {type(problem).__name__}; pass an operator, an array, a "
            "problem of the gallery, a function that builds one, or a dict of these"
        )
    return from_linear_operator(problem)


def _spectrum(operator: CurvatureOperator, truth: Truth) -> Tensor | None:
    if isinstance(truth, str):
        if truth != "dense" or operator.size > _DENSE:
            raise OptionError(
                f'expected truth to be eigenvalues or "dense", for n up to {_DENSE:,}, got '
                f"{truth!r} for n = {operator.size:,}; leave it out"
            )
        values: Tensor = torch.linalg.eigvalsh(operator.to_dense().double())
        return values.cpu()
    known = getattr(operator, "eigenvalues", None) if truth is None else truth
    if not isinstance(known, Tensor):
        return None
    if known.ndim != 1 or len(known) > operator.size:
        raise OptionError(
            f"expected at most {operator.size:,} true eigenvalues, got a tensor of shape "
            f"{tuple(known.shape)}; pass a vector"
        )
    return known.detach().double().cpu()
