"""Dual numbers ``W + ε V`` in the place of the parameters W that FSDP2 has gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from torchlinop.derivatives import without_deprecations
from torchlinop.distributed.fsdp_groups import GatheredParameter, Group, groups
from torchlinop.distributed.mended_autograd import forward_rules, is_zero, refilled
from torchlinop.formulas import WithoutWrongForwardRules

# A sharded parameter -> the shard of the direction that belongs to it; None if it is fixed.
Direction = Callable[[nn.Parameter], Tensor | None]


@contextmanager
def tangents(model: nn.Module, direction: Direction, *, reverse: bool) -> Iterator[None]:
    """Inside, parameters are dual numbers wherever FSDP2 has gathered them.

    With ``reverse``, a backward pass reduces the tangents of gradients in place of gradients. To
    be entered inside a level of ``torch.autograd.forward_ad``.
    """
    with ExitStack() as stack:
        stack.enter_context(forward_rules())
        stack.enter_context(WithoutWrongForwardRules())
        stack.enter_context(without_deprecations())
        for group in groups(model):
            of_group = _Tangents(group, direction, reverse)
            stack.enter_context(of_group.inserted())
        yield


class _Tangents:
    """Those of one group.

    Every gather of the parameters brings their tangents, in one all-gather of their own for every
    dtype; their memory is freed with that of the parameters, and filled again for a backward pass.
    """

    def __init__(self, group: Group, direction: Direction, reverse: bool) -> None:
        self.group = group
        self.reverse = reverse
        pairs = [(p, direction(p.sharded)) for p in group.parameters]
        self.local = [(parameter, shard) for parameter, shard in pairs if shard is not None]
        self.whole: list[Tensor] = []  # as the parameters are when they are gathered
        self.hooks: list[RemovableHandle] = []

    @contextmanager
    def inserted(self) -> Iterator[None]:
        try:
            # Autograd runs what was recorded last first: inserted once more when FSDP2 has recorded
            # the node that takes gradients away, so that they reach the parameters before it runs.
            with self.group.watched(self._gathered, self._freed, self._insert):
                yield
        finally:
            for hook in self.hooks:
                hook.remove()

    def _gathered(self) -> None:
        if not self.whole:
            for parameter, _ in self.local:
                self.whole.append(torch.empty_like(parameter.whole, requires_grad=False))
                if self.reverse:
                    self.hooks.append(parameter.whole.register_hook(_tangent))
        for dtype in dict.fromkeys(tangent.dtype for tangent in self.whole):
            self._fill(dtype)
        self._insert()

    def _freed(self) -> None:
        for tangent in self.whole:
            tangent.untyped_storage().resize_(0)

    def _insert(self) -> None:
        for (parameter, _), tangent in zip(self.local, self.whole, strict=True):
            # A backward pass that computes activations again differentiates what it computes.
            with torch.set_grad_enabled(self.reverse):
                parameter.replace(forward_ad.make_dual(parameter.whole, tangent))

    def _fill(self, dtype: torch.dtype) -> None:
        """Gather the tangents of this dtype."""
        pairs = zip(self.local, self.whole, strict=True)
        chosen = [(p, shard, whole) for (p, shard), whole in pairs if whole.dtype == dtype]
        mine = torch.cat([_padded(shard.to(whole), p.padded) for p, shard, whole in chosen])
        every = _all_gathered(mine, self.group.process_group)
        pieces = every.split([p.padded.numel() for p, _, _ in chosen], dim=1)
        for (parameter, _, whole), piece in zip(chosen, pieces, strict=True):
            dim = _sharded_dim(parameter)
            shards = [shard.view(parameter.padded) for shard in piece.unbind(0)]
            storage = whole.untyped_storage()
            storage.resize_(whole.numel() * whole.element_size())
            # Autograd has saved these tangents: refilling their memory changes no value.
            with refilled(whole):
                whole.copy_(torch.cat(shards, dim).narrow(dim, 0, whole.shape[dim]))


def _all_gathered(mine: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The rows (numel,) of all ranks."""
    if group is None:
        return mine[None]
    every = mine.new_empty(group.size(), mine.numel())
    dist.all_gather_into_tensor(every.view(-1), mine, group=group)
    return every


def _sharded_dim(parameter: GatheredParameter) -> int:
    data = parameter.sharded.data
    assert isinstance(data, DTensor)
    sharded = [p for p in data.placements if p.is_shard()]
    return int(sharded[-1].dim) if sharded else 0  # type: ignore[attr-defined]


def _padded(shard: Tensor, size: torch.Size) -> Tensor:
    """The entries of a shard, with zeros up to the size that all shards have: (numel,)."""
    padded = shard.new_zeros(size)
    if shard.numel():
        padded[tuple(slice(0, length) for length in shard.shape)] = shard
    return padded.view(-1)


def _tangent(gradient: Tensor) -> Tensor:
    primal: Tensor
    tangent: Tensor | None
    primal, tangent = forward_ad.unpack_dual(gradient)
    if tangent is None or is_zero(tangent):
        return torch.zeros_like(primal)
    return tangent
