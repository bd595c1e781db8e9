"""Vectors b that come from outside, as columns in working precision."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinop.algorithms.basis import small_dtype
from torchlinop.algorithms.given_operator import refuse_no_tensor
from torchlinop.algorithms.products import Products
from torchlinop.errors import NonFiniteError, VectorError


def right_hand_sides(A: Products, b: Tensor) -> tuple[Tensor, Tensor]:
    """A block (n, k) in working precision of a vector (n,) or block, and its units (k,).

    Columns are divided by these powers of two, to norms between 1 and 2 (or 0), so that squares
    of small or large numbers neither vanish nor overflow in float32.

    Raises:
        VectorError: wrong shape, dtype or device; NonFiniteError: NaN or infinite entries.
    """
    refuse_no_tensor("b", b)
    space = A.operator.space
    n = space.local_size
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
    B = (b if b.ndim == 2 else b[:, None]).detach().to(A.dtype)
    norms = space.norm(B.to(small_dtype(B.dtype)))
    if not torch.isfinite(norms).all():
        raise NonFiniteError("b has NaN or infinite entries; clean it before the solve")
    units = 2.0 ** torch.where(norms > 0, norms.log2().floor(), 0.0).cpu()
    return (B.to(small_dtype(B.dtype)) / units.to(B.device)).to(B.dtype), units
