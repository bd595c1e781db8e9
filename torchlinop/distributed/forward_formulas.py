"""Formulas in place of functions whose backward pass has no forward derivative in torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """``x σ(x)``."""
    return input * torch.sigmoid(input)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """``x tanh(log(1 + eˣ))``."""
    return input * torch.tanh(F.softplus(input))


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Samples shifted and scaled to mean 0 and variance 1 in every group of channels."""
    grouped = input.reshape(input.shape[0], num_groups, -1)
    variance, mean = torch.var_mean(grouped, dim=2, keepdim=True, correction=0)
    normal = ((grouped - mean) * torch.rsqrt(variance + eps)).reshape(input.shape)
    channels = (1, -1) + (1,) * (input.ndim - 2)
    scaled = normal if weight is None else normal * weight.view(channels)
    return scaled if bias is None else scaled + bias.view(channels)


def mse_loss(input: Tensor, target: Tensor, *, reduction: str = "mean", **options: Any) -> Tensor:
    """The mean, sum or tensor of squared differences."""
    if any(value is not None for value in options.values()):
        return F.mse_loss(input, target, reduction=reduction, **options)
    squares = (input - target) * (input - target)
    if reduction == "none":
        return squares
    total = squares.sum()
    return total / squares.numel() if reduction == "mean" else total


_FORMULAS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.silu: silu,
    F.mish: mish,
    F.group_norm: group_norm,
    F.mse_loss: mse_loss,
}


class WithForwardFormulas(TorchFunctionMode):
    """Inside, the functions are replaced by their formulas."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        formula: Callable[..., Any] = _FORMULAS.get(func, func)
        return formula(*args, **(kwargs or {}))
