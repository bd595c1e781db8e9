"""Formulas in place of functions whose backward pass has no forward derivative in torch."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlinop.formulas import Replacing, group_norm


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """``x σ(x)``."""
    return input * torch.sigmoid(input)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """``x tanh(log(1 + eˣ))``."""
    return input * torch.tanh(F.softplus(input))


def mse_loss(input: Tensor, target: Tensor, *, reduction: str = "mean", **options: Any) -> Tensor:
    """The mean, sum or tensor of squared differences."""
    if any(value is not None for value in options.values()):
        return F.mse_loss(input, target, reduction=reduction, **options)
    squares = (input - target) * (input - target)
    if reduction == "none":
        return squares
    total = squares.sum()
    return total / squares.numel() if reduction == "mean" else total


class WithForwardFormulas(Replacing):
    """Inside, the functions are replaced by these formulas."""

    formulas: ClassVar = {
        F.silu: silu,
        F.mish: mish,
        F.group_norm: group_norm,
        F.mse_loss: mse_loss,
    }
