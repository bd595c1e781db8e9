"""Formulas in place of kernels whose second derivative torch gets wrong, or a refusal of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g v / ‖v‖`` with one norm for every index of axis ``dim``.

    The double backward of ``torch._weight_norm`` fails ``torch.autograd.gradgradcheck`` on the
    CPU (measured with torch 2.15): Hessians come out asymmetric.
    """
    axes = [axis for axis in range(v.ndim) if axis != dim]
    norms: Tensor = torch.linalg.vector_norm(v, dim=axes, keepdim=True)
    return v * (g / norms)


def group_norm(  # noqa: PLR0917  # as torch names and orders them
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """``(x − mean) / √(var + ε)`` over each group of channels, scaled and shifted by channel.

    Taken for several vectors at once, the double backward of the kernel of torch 2.6 fails for
    most shapes, and is another matrix for some.
    """
    wide = torch.promote_types(input.dtype, torch.float32)
    grouped = input.reshape(len(input), num_groups, -1).to(wide)
    centred = grouped - grouped.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = (centred * scale).reshape(input.shape).to(input.dtype)
    of_channels = (1, -1, *[1] * (input.ndim - 2))
    y = y if weight is None else y * weight.view(of_channels)
    return y if bias is None else y + bias.view(of_channels)


@cache
def _batches_group_norm() -> bool:
    """Whether torch takes the double backward of its kernel for two vectors at once."""
    x = torch.linspace(-1, 1, 24, dtype=torch.float64, device="cpu").view(2, 4, 3)
    x = x.requires_grad_()
    V = torch.stack([x.detach().cos(), x.detach().square()])
    y = F.group_norm(x, 2, x.detach()[0, :, 0]).sin().sum()
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    one_by_one = [torch.autograd.grad(gradient, x, v, retain_graph=True)[0] for v in V]
    try:
        (at_once,) = torch.autograd.grad(gradient, x, V, is_grads_batched=True)
    except RuntimeError:
        return False
    return torch.allclose(at_once, torch.stack(one_by_one))


class Replacing(TorchFunctionMode):
    """Inside, functions are replaced by their formulas, which a subclass lists."""

    formulas: ClassVar[Mapping[Callable[..., Any], Callable[..., Tensor]]]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        formula: Callable[..., Any] = self.formulas.get(func, func)
        return formula(*args, **(kwargs or {}))


class WithFormulas(Replacing):
    """Inside, the kernels are replaced by these formulas."""

    formulas: ClassVar = {
        torch._weight_norm: weight_norm,
        F.group_norm: group_norm,
        torch.group_norm: group_norm,
    }


def _not_of_products(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function`` but for ``reduce="prod"``."""

    def checked(
        input: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, **options: Any
    ) -> Tensor:
        if reduce == "prod":
            raise NotImplementedError('the forward AD of scatter_reduce with "prod" is wrong')
        return function(input, dim, index, src, reduce, **options)

    return checked


class WithoutWrongForwardRules(Replacing):
    """Inside, functions of which torch has a forward rule that is wrong have none.

    That of ``scatter_reduce`` with products is off by as much as its size, on one entry as on
    several (measured with torch 2.15).
    """

    formulas: ClassVar = {
        function: _not_of_products(function)
        for function in (torch.scatter_reduce, Tensor.scatter_reduce, Tensor.scatter_reduce_)
    }


def needs_formulas(model: nn.Module) -> bool:
    """Whether the model uses weight normalisation, as a parametrization or as a hook.

    Or a GroupNorm, where torch cannot take its second derivative for several vectors.
    """
    parts = [*model.modules(), *(h for m in model.modules() for h in m._forward_pre_hooks.values())]
    if any(type(part).__name__ in ("_WeightNorm", "WeightNorm") for part in parts):
        return True
    return any(isinstance(part, nn.GroupNorm) for part in parts) and not _batches_group_norm()
