"""Σ_n ℓ_n or its mean: what a batch of terms counts under a reduction."""

from __future__ import annotations

from typing import Literal, get_args

from torchlinop.errors import OptionError
from torchlinop.weighting import SUM, Count, Weighting

Reduction = Literal["mean", "sum"]


def weighting_of(reduction: Reduction, count: Count, unit: str) -> Weighting:
    """The weighting of a mean over ``count(batch)`` terms, or of a sum.

    Raises:
        OptionError: the reduction is neither.
    """
    if reduction not in get_args(Reduction):
        raise OptionError(
            f"expected reduction to be one of {', '.join(get_args(Reduction))}, got {reduction!r}; "
            'a matrix belongs to a scalar loss: pass reduction="mean"'
        )
    return Weighting(count, unit) if reduction == "mean" else SUM
