"""What an answer is worth: residuals and orthogonality taken again, and claims held to them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torchlinop.compare.answer import Answer
from torchlinop.compare.request import Request
from torchlinop.compare.subject import Subject
from torchlinop.operators.base import CurvatureOperator

_SLACK = 1.1  # between a claim and the truth, beside rounding
_PARALLEL = 0.1  # a singular value of unit vectors below it: one of them is a copy


@dataclass(frozen=True)
class Judged:
    """One answer. NaN, or None, where the truth is not known or nothing is claimed."""

    pairs: int
    residual: float  # the largest ‖A x − θ x‖ / |θ|
    error: float  # the largest |θ_i − λ_i| / |λ_i|, copies counted
    orthogonality: float  # max |XᴴX − I|
    converged: int  # pairs whose true residual is below tol |θ|
    ghosts: int  # pairs that are copies of others
    missed: int | None  # eigenvalues wanted that no value is near to
    claimed_residual: float
    claimed: int | None  # pairs called converged
    makes_claims: bool
    false: tuple[str, ...]  # claims that do not hold


def judge(subject: Subject, answer: Answer, request: Request) -> Judged:
    """Judge the k most wanted pairs of an answer, by as many products that nobody counts.

    Vectors are rounded to the dtype of the operator for the product; all else is in float64.
    Residuals are relative to |θ|, or to ε^(2/3) ‖A‖ where that is more.
    """
    evidence = _Evidence(subject, answer.most_wanted(request.k, request.which), request)
    claims = evidence.answer
    return Judged(
        pairs=len(claims),
        residual=float((evidence.residuals / evidence.scales).max()),
        error=evidence.error,
        orthogonality=evidence.orthogonality,
        converged=int((evidence.residuals <= evidence.allowed).sum()),
        ghosts=evidence.ghosts,
        missed=evidence.missed,
        claimed_residual=math.nan
        if claims.residuals is None
        else float((claims.residuals / evidence.scales).max()),
        claimed=None if claims.converged is None else int(claims.converged.sum()),
        makes_claims=claims.residuals is not None or claims.converged is not None,
        false=tuple(evidence.false_claims()),
    )


class _Evidence:
    """What is measured of an answer, once."""

    def __init__(self, subject: Subject, answer: Answer, request: Request) -> None:
        self.subject, self.answer, self.request = subject, answer, request
        self.theta = answer.eigenvalues
        norms = torch.linalg.vector_norm(answer.eigenvectors, dim=0)
        self.X = answer.eigenvectors / norms.clamp_min(torch.finfo(torch.float64).tiny)

    @cached_property
    def residuals(self) -> Tensor:
        """(m,) ‖A x − θ x‖ of unit vectors."""
        A, X = self.subject.operator, self.X
        R = _products(A, X) - X * self.theta.to(X.device)
        norms: Tensor = torch.linalg.vector_norm(R, dim=0)
        return norms.cpu()

    @property
    def scales(self) -> Tensor:
        """(m,) what residuals are relative to."""
        eps = torch.finfo(self.subject.operator.dtype).eps
        return self.theta.abs().clamp_min(eps ** (2 / 3) * self.subject.norm)

    @property
    def allowed(self) -> Tensor:
        """(m,) residuals of pairs that have converged."""
        return _SLACK * self.request.tol * self.scales + self.subject.rounding

    @cached_property
    def gram(self) -> Tensor:
        # In pieces, as one long sum of n squares rounds by up to n roundoffs.
        return torch.stack([x.mH @ x for x in self.X.split(4096)]).sum(0).cpu()

    @property
    def orthogonality(self) -> float:
        return float((self.gram - torch.eye(len(self.theta))).abs().max())

    @cached_property
    def exact(self) -> Tensor | None:
        return self.subject.wanted(self.request.k, self.request.which)

    @property
    def error(self) -> float:
        """The i-th value is compared with the i-th eigenvalue: a copy too many is an error."""
        if self.exact is None:
            return math.nan
        if len(self.theta) < len(self.exact):
            return math.inf
        found, exact = (self._compared(t).sort().values for t in (self.theta, self.exact))
        eps = torch.finfo(self.subject.operator.dtype).eps
        scales = exact.abs().clamp_min(eps ** (2 / 3) * self.subject.norm)
        return float(((found - exact).abs() / scales).max())

    @property
    def ghosts(self) -> int:
        """Vectors that depend on others, or values called converged that are copies.

        k vectors of full rank and small residuals belong to k different eigenvalues, copies
        counted (Kahan; Parlett 1980, theorem 11.5.1); so that ghosts are vectors that do not.
        Eigenvectors of an asymmetric matrix may be as near to each other as they like.
        """
        return max(self._dependent(self.gram), self.copies)

    def _dependent(self, gram: Tensor) -> int:
        """Vectors that depend on others, by their inner products."""
        if not self.subject.symmetric:
            return 0
        return int((torch.linalg.eigvalsh(gram) < _PARALLEL**2).sum())

    @cached_property
    def copies(self) -> int:
        """Values called converged and near to eigenvalues, beyond as many as these are."""
        called = self.answer.converged
        if called is None or not self.subject.whole:
            return 0
        assert self.subject.eigenvalues is not None
        near = called & (self._gaps(self.subject.eigenvalues) <= self.allowed)
        values, widths = self.theta.real[near], self.allowed[near]
        return len(values) - matched(self.subject.eigenvalues, values, widths)

    def _gaps(self, eigenvalues: Tensor) -> Tensor:
        """(m,) how far every value is from the eigenvalue next to it."""
        return torch.stack([(eigenvalues - value).abs().min() for value in self.theta.real])

    @cached_property
    def missed(self) -> int | None:
        """Eigenvalues wanted to which no value is as near as its residual says it may be."""
        if self.exact is None:
            return None
        widths = torch.maximum(_SLACK * self.residuals + self.subject.rounding, self.allowed)
        exact, found = self._compared(self.exact), self._compared(self.theta)
        return len(exact) - matched(exact, found, widths)

    def _compared(self, values: Tensor) -> Tensor:
        """Where magnitudes are wanted, λ is as good as -λ, of which one may be beyond the k."""
        return values.abs() if self.request.which == "LM" else values.real

    def false_claims(self) -> Iterator[str]:
        """Statements of the solver that are not so, by more than slack and rounding."""
        claims, rounding = self.answer, self.subject.rounding
        if claims.residuals is not None:
            i, excess = _worst(self.residuals, _SLACK * claims.residuals + rounding)
            if excess > 1:
                yield _stated("a residual", self.residuals[i], claims.residuals[i])
        if claims.bounds is not None and self.subject.whole:
            assert self.subject.eigenvalues is not None
            gaps = self._gaps(self.subject.eigenvalues)
            i, excess = _worst(gaps, _SLACK * claims.bounds + rounding)
            if excess > 1:
                yield _stated("an error", gaps[i], claims.bounds[i])
        called = claims.converged
        if called is None or not bool(called.any()):
            return
        wrong = int((self.residuals > self.allowed)[called].sum())
        if wrong:
            yield f"{wrong} of {int(called.sum())} pairs called converged are not"
        copies = max(self._dependent(self.gram[called][:, called]), self.copies)
        if copies:
            yield f"{copies} of {int(called.sum())} pairs called converged are copies of others"


def _products(A: CurvatureOperator, X: Tensor) -> Tensor:
    """A X in float64, for complex X of a real A too."""
    if X.is_complex() and not A.dtype.is_complex:
        return torch.complex(_products(A, X.real), _products(A, X.imag))
    return A.matmat(X.to(A.dtype).contiguous()).to(X.dtype)


def _worst(true: Tensor, allowed: Tensor) -> tuple[int, float]:
    """Where the truth exceeds what is allowed by the largest factor, and that factor.

    A claim of NaN is none, and hides no other.
    """
    ratios = (true / allowed).nan_to_num(0.0, torch.inf)
    return int(ratios.argmax()), float(ratios.max())


def _stated(what: str, true: Tensor, claimed: Tensor) -> str:
    return f"{what} of {float(true):.0e} is claimed to be {float(claimed):.0e}"


def matched(exact: Tensor, values: Tensor, widths: Tensor) -> int:
    """How many of the values are eigenvalues up to their widths, each counting for one value."""
    left = exact.sort().values.tolist()
    order = (values + widths).argsort()  # whose interval ends first takes the first that fits
    found = 0
    for value, width in zip(values[order].tolist(), widths[order].tolist(), strict=True):
        i = next((i for i, e in enumerate(left) if abs(e - value) <= width), None)
        if i is not None:
            del left[i]
            found += 1
    return found
