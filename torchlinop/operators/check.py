"""Measures whether a product is a fixed symmetric linear map, and how noisy it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from torchlinop.errors import NonFiniteError, PrecisionWarning, SymmetryError, warn_caller
from torchlinop.model_state import full_precision
from torchlinop.space import VectorSpace

_LINEAR = 0.1  # half-precision products are off by a hundredth, a nonlinear map by its size
_FACTOR = 0.7548776662466927  # irrational, so that scaling by it rounds every product anew


class Multiplies(Protocol):
    """What is checked: a product on a space."""

    @property
    def space(self) -> VectorSpace: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    def matvec(self, v: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class CheckReport:
    """Defects of a product, each relative to the norm of the product."""

    operator: str  # its repr
    notes: tuple[str, ...]  # facts about its parameters, model and memory, a line each
    repeatability: float  # ‖A v - (A v)'‖ of two products with one v
    symmetry: float  # |⟨u, A v⟩ - ⟨A u, v⟩| / (‖u‖ ‖A v‖ + ‖v‖ ‖A u‖)
    linearity: float  # ‖A(u + c v) - A u - c A v‖
    noise: float  # the larger of linearity and ‖A(c v) - c A v‖: what rounding does to a product
    norm: float  # ‖A v‖ for a unit vector v, after a step of power iteration: a scale of A
    finite: bool
    bounds: tuple[float, float, float]  # what repeatability, symmetry and linearity are held to

    @property
    def ok(self) -> bool:
        """Whether every defect is within its bound: rounding, or the noise it makes."""
        defects = (self.repeatability, self.symmetry, self.linearity)
        return self.finite and all(d <= b for d, b in zip(defects, self.bounds, strict=True))

    def __repr__(self) -> str:
        if not self.finite:
            return f"CheckReport  FAILED: products are not finite\n  {self.operator}"
        rows = [
            ("repeatability", self.repeatability, "two products with one v"),
            ("symmetry", self.symmetry, "<u, A v> against <A u, v>"),
            ("linearity", self.linearity, "A (u + c v) against A u + c A v"),
        ]
        lines = [f"CheckReport  {'ok' if self.ok else 'FAILED'}", f"  {self.operator}"]
        for (name, value, meaning), bound in zip(rows, self.bounds, strict=True):
            verdict = "ok    " if value <= bound else "FAILED"
            lines.append(f"  {name:14} {value:.1e}  {verdict}  {meaning}")
        lines.append(f"  noise          {self.noise:.1e}          of a product, by rounding")
        lines.append(f"  norm           {self.norm:.1e}          a lower bound of the largest |λ|")
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


def _bytes_of(space: VectorSpace) -> int:
    return space.local_size * space.dtype.itemsize


def check(operator: Multiplies, *, seed: int = 0, strict: bool = False) -> CheckReport:
    """Take six products of ``operator`` and report their defects.

    Warns with PrecisionWarning when products are much noisier than the dtype of the vectors.

    Raises:
        NonFiniteError, SymmetryError: with ``strict``, where the report is not ok.
    """
    with full_precision(operator.space.device):
        report = _measured(operator, seed)
    _announce(operator, report, strict=strict)
    return report


def _measured(operator: Multiplies, seed: int) -> CheckReport:
    space = operator.space
    u, v = space.random(2, seed).unbind(1)
    Av = operator.matvec(v)
    v = Av / space.norm(Av).clamp_min(torch.finfo(space.dtype).tiny)  # towards the large |λ|
    u = u / space.norm(u)
    Av, Au = operator.matvec(v), operator.matvec(u)
    scaled, mixed = operator.matvec(_FACTOR * v), operator.matvec(u + _FACTOR * v)
    again = operator.matvec(v)

    def relative(difference: Tensor, *scales: Tensor) -> float:
        scale = sum(float(space.norm(s)) for s in scales)
        return float(space.norm(difference)) / scale if scale else 0.0

    products = torch.stack([Av, Au, scaled, mixed, again])
    products_at = float(space.norm(Au)) + float(space.norm(Av))
    forms = space.inner(u[:, None], Av[:, None]) - space.inner(Au[:, None], v[:, None])
    defect = float(forms.abs())
    eps = torch.finfo(space.dtype).eps
    linearity = relative(mixed - Au - _FACTOR * Av, Au, Av)
    noise = max(linearity, relative(scaled - _FACTOR * Av, _FACTOR * Av))
    return CheckReport(
        operator=repr(operator),
        notes=(*operator.notes, f"memory: {_bytes_of(space):,} bytes a vector"),
        repeatability=relative(again - Av, Av),
        symmetry=defect / products_at if products_at else 0.0,
        linearity=linearity,
        noise=noise,
        norm=float(space.norm(Av)),
        finite=not space.agree(not bool(torch.isfinite(products).all())),
        # Two equal products may differ by the order of atomic sums alone; an asymmetry may be
        # as large as the noise of the products in it.
        bounds=(100 * eps, max(100 * eps, 10 * min(noise, _LINEAR / 10)), _LINEAR),
    )


def _announce(operator: Multiplies, report: CheckReport, *, strict: bool) -> None:
    """Raise or warn of what is wrong."""
    if strict and not report.finite:
        raise NonFiniteError(
            f"the products of {operator!r} hold NaN or infinity; "
            "look for them in the data and the parameters"
        )
    if strict and not report.ok:
        raise SymmetryError(
            f"|<u,Av>-<v,Au>| = {report.symmetry:.0e}, linearity defect {report.linearity:.0e}, "
            f"repeatability {report.repeatability:.0e}; noise floor {report.noise:.0e} of the "
            f"product of {operator!r}. Make the product symmetric, or look for randomness in it"
        )
    dtype = operator.space.dtype
    if report.finite and report.noise > torch.finfo(dtype).eps ** 0.5:
        warn_caller(
            f"product noise is {report.noise:.0e} of the norm, in {dtype} vectors; "
            f"eigenvalues below {report.noise * report.norm:.1g} and tol < {report.noise:.0e} are "
            "not meaningful.",
            PrecisionWarning,
        )
