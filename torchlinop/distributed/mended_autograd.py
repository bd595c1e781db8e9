"""Functions of autograd inside FSDP2 and DTensor, with the derivatives that torch left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


@contextmanager
def _methods(mended: list[tuple[Any, str, Callable[..., Any]]]) -> Iterator[None]:
    """Static methods of functions of autograd, replaced inside."""
    before = [vars(function).get(name) for function, name, _ in mended]
    for function, name, method in mended:
        setattr(function, name, staticmethod(method))
    try:
        yield
    finally:
        for (function, name, _), method in zip(mended, before, strict=True):
            if method is None:
                delattr(function, name)
            else:
                setattr(function, name, method)


@contextmanager
def forward_rules() -> Iterator[None]:
    """FSDP2's functions of autograd, which hand tensors through, hand tangents through."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    def jvp(ctx: Any, group: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else t.view_as(t) for t in tangents)

    with _methods([(_fsdp_param_group.RegisterPostBackwardFunction, "jvp", jvp)]):
        yield


def refilled(saved: Tensor) -> AbstractContextManager[None]:
    """Inside, a tensor that autograd has saved may be written to: with the values that it had."""
    held: AbstractContextManager[None]
    held = torch.autograd._unsafe_preserve_version_counter(saved)  # type: ignore[attr-defined]
    return held


def is_zero(tangent: Tensor) -> bool:
    """Whether it is a zero without memory, which cannot be written to."""
    return bool(tangent._is_zerotensor())


@contextmanager
def twice_differentiable_dtensors() -> Iterator[None]:
    """Backward passes of DTensor's own functions are part of the graph.

    That of ``from_local`` hands out a redistributed local tensor without its graph (torch 2.6 to
    2.15); before ``NestedRedistribute`` came, so did those of ``to_local`` and ``redistribute``.
    """
    from torch.distributed.tensor import _api, _redistribute

    mended: list[tuple[Any, str, Callable[..., Any]]]
    mended = [(_api._FromTorchTensor, "backward", _from_local_backward)]
    if not hasattr(_redistribute, "NestedRedistribute"):
        mended += [(_api._ToTorchTensor, "backward", _to_local_backward)]
        mended += [(_redistribute.Redistribute, "backward", _redistribute_backward)]
    with _methods(mended):
        yield


def _from_local_backward(ctx: Any, gradient: Any) -> tuple[Any, ...]:
    if gradient is None:
        return (None,) * 7
    names = ("forward_input_placements", "previous_placement")
    forward = next(getattr(ctx, name) for name in names if hasattr(ctx, name))
    placements = getattr(ctx, "grad_placements", None) or _summed(forward)
    return gradient.redistribute(placements=placements).to_local(), *(None,) * 6


def _to_local_backward(ctx: Any, gradient: Any) -> tuple[Any, ...]:
    spec = ctx.dtensor_spec
    placements = ctx.grad_placements or _summed(spec.placements)
    whole = {"run_check": False, "shape": spec.shape, "stride": spec.stride}
    return DTensor.from_local(gradient, spec.mesh, placements, **whole), None


def _redistribute_backward(ctx: Any, gradient: Any) -> tuple[Any, ...]:
    return gradient.redistribute(placements=_summed(ctx.current_spec.placements)), *(None,) * 4


def _summed(placements: Any) -> tuple[Any, ...]:
    """What a gradient is placed as: whole where the value is a sum not taken yet."""
    return tuple(Replicate() if p.is_partial() else p for p in placements)
