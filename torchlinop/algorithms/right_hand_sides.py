"""Vectors b that come from outside, as columns in working precision."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinop.algorithms.products import Products
from torchlinop.errors import NonFiniteError, VectorError


def right_hand_sides(A: Products, b: Tensor) -> Tensor:
    """A block (n, k) in working precision of a vector (n,) or block.

    Raises:
        VectorError: wrong shape, dtype or device; NonFiniteError: NaN or infinite entries.
    """
    n, space = A.operator.size, A.operator.space
    if b.ndim not in (1, 2) or b.shape[0] != n:
        raise VectorError(
            f"expected b of shape ({n},) or ({n}, k), got {tuple(b.shape)}; "
            "pass right-hand sides as columns"
        )
    if b.dtype not in (space.dtype, A.dtype) or b.device != space.device:
        raise VectorError(
            f"expected b in {space.dtype} on {space.device}, got {b.dtype} on {b.device}; "
            f"pass b.to({space.dtype}, device={str(space.device)!r})"
        )
    B = b.detach().reshape(n, -1).to(A.dtype)
    if not torch.isfinite(A.norms(B)).all():
        raise NonFiniteError("b has NaN or infinite entries; clean it before the solve")
    return B
