"""Means over independent probes, with standard errors and intervals by Student's t."""

from __future__ import annotations

import math
from typing import NamedTuple

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
