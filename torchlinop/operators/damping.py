"""1 / (λ + d): which numbers d damp a matrix of eigenvalues λ so that it has an inverse."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from torchlinop.errors import OptionError


def finite_number(name: str, value: object) -> float:
    """The value, a number or a tensor of one entry, as a float.

    Raises:
        OptionError: it is no real number, or not finite.
    """
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if not isinstance(number, numbers.Real) or not math.isfinite(number):
        raise OptionError(
            f"expected {name} to be a finite real number, got {value!r}; pass {name}=1e-3, say"
        )
    return float(number)


def inverted(damped: Tensor, damping: float, dtype: torch.dtype) -> Tensor:
    """``1 / (λ + d)`` in this dtype, for ``damped = λ + d`` in float64.

    Raises:
        OptionError: it is not finite, as λ + d is zero, or too small for the dtype.
    """
    inverse = (1 / damped).to(dtype)
    if not inverse.isfinite().all():
        raise OptionError(
            f"expected a damping that makes the matrix invertible in {dtype}, got {damping:g}, "
            f"which leaves an eigenvalue of {float(damped.abs().min()):.3g}; "
            "pass damping=1e-3, say"
        )
    return inverse
