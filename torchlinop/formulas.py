"""Formulas in place of kernels whose second derivative torch gets wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
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


_FORMULAS: dict[Callable[..., Any], Callable[..., Tensor]] = {torch._weight_norm: weight_norm}


class WithFormulas(TorchFunctionMode):
    """Inside, the kernels are replaced by their formulas."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        formula: Callable[..., Any] = _FORMULAS.get(func, func)
        return formula(*args, **(kwargs or {}))


def needs_formulas(model: nn.Module) -> bool:
    """Whether the model uses weight normalisation, as a parametrization or as a hook."""
    parts = [*model.modules(), *(h for m in model.modules() for h in m._forward_pre_hooks.values())]
    return any(type(part).__name__ in ("_WeightNorm", "WeightNorm") for part in parts)
