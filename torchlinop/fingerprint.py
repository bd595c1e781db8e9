"""A number for the bits of a tensor, by which two processes see that they hold the same."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = 2**18  # entries at a time: what is needed besides the tensor is small
# Odd numbers of 64 bits with as many ones as zeros: multiples mix low bits into high ones.
_MULTIPLIER, _CHAIN = -7046029254386353131, -4417276706812531889


def fingerprint(X: Tensor) -> Tensor:
    """An int64 scalar on the device of X that other bits, or another order, change.

    Two tensors that differ have the same one with probability 2⁻⁶⁴. Costs a few passes over X.
    """
    X = torch.view_as_real(X) if X.is_complex() else X
    total = torch.zeros((), dtype=torch.int64, device=X.device)
    for column in X.mT if X.ndim == 2 else X.reshape(1, -1):
        for piece in column.split(_PIECE):
            bits = piece.contiguous().view(_BITS[piece.itemsize]).long()
            bits = (bits >> 31).bitwise_xor_(bits).mul_(_MULTIPLIER)
            bits ^= bits >> 29
            places = 2 * torch.arange(len(bits), device=X.device) + 1
            total = total * _CHAIN + bits.mul_(places).sum()
    return total ^ (total >> 32)


def signs(number: Tensor, bits: int = 32) -> Tensor:
    """The lower bits of an int64 scalar as ±1: (bits,)."""
    return 2 * ((number >> torch.arange(bits, device=number.device)) & 1) - 1
