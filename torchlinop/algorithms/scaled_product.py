"""A V = s W with s a power of two near ‖A‖: squares of the entries of W are in range."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinop.algorithms.products import Products

_LEAST, _MOST = 2.0**-120, 2.0**120  # float32 holds these, and their inverses


def scaled_product(products: Products, V: Tensor, norm: Tensor | None, W: Tensor) -> Tensor:
    """Write W with ``A V = s W``, and return s, a float64 scalar on the device.

    ``norm`` is an estimate of ‖A‖; without one, the largest entry of A V serves. In float32,
    squares of numbers below 1e-19 are zero, and those above 1e19 infinite. Powers of two scale
    exactly: no other number depends on s.
    """
    AV = products(V)
    space = products.operator.space
    size = space.largest_entry(AV).double() if norm is None else norm
    power = size / torch.frexp(size).mantissa  # exact, and NaN for zero
    s = torch.where(size > 0, power, 1.0).clamp(_LEAST, _MOST)
    torch.mul(AV.mT, (1 / s).to(AV.real.dtype), out=W.mT)
    return s
