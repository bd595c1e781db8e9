"""How much of a spectrum is negative: by quadrature, or exactly where that costs no more."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from torchlinop.algorithms.atoms import standard_error
from torchlinop.algorithms.quadrature import slq
from torchlinop.operators.base import CurvatureOperator
from torchlinop.spectrum.config import LanczosConfig


class Masses(NamedTuple):
    """How many eigenvalues are negative, and how large they are together."""

    negative_fraction: float = math.nan
    negative_fraction_low: float = math.nan
    negative_fraction_high: float = math.nan
    negative_mass: float = math.nan
    negative_mass_stderr: float = math.nan  # of the probes


def masses(op: CurvatureOperator, config: LanczosConfig, rounding: float) -> Masses:
    """Both masses; eigenvalues of a size up to ``rounding`` have no sign, if they are all known.

    Costs ``num_probes num_steps`` products, or n if that is less.

    Raises:
        KeyboardInterrupt: before all of them are taken; fewer steps would claim what is not so.
    """
    if op.size <= config.num_probes * config.num_steps:
        return _exact(op, rounding)
    quadrature = slq(op, config.num_probes, config.num_steps, seed=config.seed)
    if quadrature.warnings:  # nothing but Ctrl-C ends it early
        raise KeyboardInterrupt
    fraction = quadrature.negative_mass()
    negative = quadrature.spectral_sum(lambda t: (-t).clamp_min(0)).samples
    total = quadrature.spectral_sum(torch.abs).samples
    if not float(total.sum()):
        return Masses(*fraction, 0.0, 0.0)
    mass = float(negative.sum() / total.sum())
    # The delta method, for a ratio of means.
    stderr = standard_error(negative - mass * total) / total.mean()
    return Masses(*fraction, mass, float(stderr))


def _exact(op: CurvatureOperator, rounding: float) -> Masses:
    A = op.to_dense()
    A = A.to(torch.promote_types(A.dtype, torch.float64))
    values = torch.linalg.eigvalsh((A + A.mH) / 2)
    sizes = values.abs()
    below = values < -rounding
    fraction = float(below.double().mean())
    mass = float(sizes[below].sum() / sizes.sum()) if bool(sizes.any()) else 0.0
    return Masses(fraction, fraction, fraction, mass, 0.0)
