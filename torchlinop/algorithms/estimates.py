"""Means over independent probes, with standard errors and intervals by Student's t."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from torchlinop.algorithms.atoms import standard_error
from torchlinop.algorithms.student import student_quantile
from torchlinop.errors import OptionError


class Estimate(NamedTuple):
    """A mean over probes, and its standard error; infinite for a single probe."""

    value: Tensor
    stderr: Tensor  # of the same shape


class Interval(NamedTuple):
    """A number and bounds on it."""

    value: float
    low: float
    high: float


def of_probes(mean: Tensor, variance: Tensor, probes: int, size: int, complex_: bool) -> Estimate:
    """A mean of ``vᴴ f(A) v`` over probes v uniform on the unit sphere, by the law of that number.

    Its variance is ``2 / (n + 2)`` times that of f over the eigenvalues, ``1 / (n + 1)`` for
    complex v. Few samples tell less about it, as where one eigenvalue dominates, most are small
    and a few large: the t-interval of five would miss the truth in a quarter of all cases.
    """
    shrinkage = 1 / (size + 1) if complex_ else 2 / (size + 2)
    stderr = (shrinkage * variance.clamp_min(0) / probes).sqrt()
    return Estimate(mean, stderr if probes > 1 else torch.full_like(mean, torch.inf))


def mean_of(samples: Tensor) -> Estimate:
    """Of samples that are the first axis."""
    return Estimate(samples.mean(0), standard_error(samples))


def refuse_probability(name: str, p: float, example: float) -> None:
    """Raise OptionError unless p is one."""
    if not 0 < p < 1:
        raise OptionError(f"expected {name} between 0 and 1, got {p}; pass {example}")


def quantile(samples: int, level: float) -> float:
    """Of Student's t, for a two-sided interval; infinite for a single sample."""
    refuse_probability("level", level, 0.95)
    return student_quantile(samples - 1, (1 + level) / 2) if samples > 1 else math.inf
