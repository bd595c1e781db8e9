"""What is read from the ends of a spectrum: gap and condition, or range, sharpness and masses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchlinop.algorithms.lanczos import lanczos
from torchlinop.algorithms.products import breakdown
from torchlinop.operators.base import CurvatureOperator
from torchlinop.spectrum.config import LanczosConfig
from torchlinop.spectrum.masses import Masses, masses

_END_TOL = 1e-4  # of ‖A‖: the residual of an end of the spectrum that is not among the k


@dataclass(frozen=True)
class Readings:
    """The fields of these names of ``SpectrumResult``: NaN for the other kind of matrix."""

    max_eigenvalue: float
    min_eigenvalue: float
    spectral_gap: float = math.nan
    ritz_condition_number: float = math.nan
    ritz_effective_rank: float = math.nan
    has_negative_eigenvalues: bool = False
    n_negative: int = 0
    range_ratio: float = math.nan
    sharpness_score: float = math.nan
    most_negative_eigenvalue: float = math.nan
    negative_fraction: float = math.nan
    negative_fraction_low: float = math.nan
    negative_fraction_high: float = math.nan
    negative_mass: float = math.nan
    negative_mass_stderr: float = math.nan


def noise(op: CurvatureOperator) -> float:
    """Of eigenvalues, relative to ‖A‖: whose sign is not known below."""
    precision = op.layout.precision if op.layout else op.dtype
    return max(breakdown(op.dtype), torch.finfo(precision).eps)


def condition(values: Tensor, errors: Tensor) -> float:
    """``λ₁ / λ_k`` of descending values, infinite if λ_k is zero to rounding."""
    if float(values[-1]) <= float(errors[-1]):
        return math.inf
    return float(values[0] / values[-1])


def of_psd(values: Tensor, errors: Tensor) -> Readings:
    """Of the k descending eigenvalues of a positive semidefinite matrix, by themselves."""
    squares = float(values.square().sum())
    return Readings(
        max_eigenvalue=float(values[0]),
        min_eigenvalue=float(values[-1]),
        spectral_gap=float(values[0] - values[1]) if len(values) > 1 else math.nan,
        ritz_condition_number=condition(values, errors),
        ritz_effective_rank=float(values.sum()) ** 2 / squares if squares else 0.0,
    )


def of_indefinite(
    op: CurvatureOperator, config: LanczosConfig, values: Tensor, errors: Tensor,
    warnings: list[str], *, further: bool,
) -> Readings:  # fmt: skip
    """Of the k descending eigenvalues, and by ``further`` products, without which some are NaN.

    What is cut short by Ctrl-C is NaN as well: an end half sought would be taken for the end.
    """
    smallest = _known(values.flip(0), errors.flip(0), op.size, sign=-1)
    largest = _known(values, errors, op.size, sign=1)
    norm = float(values.abs().max())
    below, share = -noise(op) * norm, Masses()
    try:
        if further and math.isnan(smallest):
            smallest = _sought(op, config, "SA", -norm, warnings)
        if further and math.isnan(largest):
            largest = _sought(op, config, "LA", norm, warnings)
        if further and config.num_probes:
            share = masses(op, config, -below)
    except KeyboardInterrupt:
        warnings.append("interrupted: numbers that are NaN were not computed")
    negative = bool(values[-1] < below) or smallest < below
    return Readings(
        max_eigenvalue=largest,
        min_eigenvalue=smallest,
        has_negative_eigenvalues=negative,
        n_negative=int((values < -errors).sum()),
        range_ratio=abs(largest) / abs(smallest) if smallest else math.inf,
        sharpness_score=norm,
        most_negative_eigenvalue=smallest if negative or math.isnan(smallest) else 0.0,
        **share._asdict(),
    )


def _known(values: Tensor, errors: Tensor, n: int, *, sign: int) -> float:
    """The eigenvalue at this end, of values that begin there; NaN if it is not among them.

    Of the k values of largest size, those of one sign are the outermost of that sign.
    """
    if len(values) == n or sign * float(values[0]) > float(errors[0]):
        return float(values[0])
    return math.nan


def _sought(
    op: CurvatureOperator, config: LanczosConfig, which: Literal["SA", "LA"], norm: float,
    warnings: list[str],
) -> float:  # fmt: skip
    """The eigenvalue at an end that is nearer to zero than the other, by a run of its own."""
    # Shifted, so that the tolerance is one of ‖A‖: relative to an end near zero it would be out of
    # reach, as eigenvalues crowd there.
    tol = max(_END_TOL, noise(op))
    found = lanczos(op.shift(-norm), 1, which=which, tol=tol, seed=config.seed)
    if found.status == "interrupted":
        raise KeyboardInterrupt
    end = "smallest" if which == "SA" else "largest"
    warnings += [f"of the {end} eigenvalue: {warning}" for warning in found.warnings]
    return float(found.eigenvalues[0]) + norm
