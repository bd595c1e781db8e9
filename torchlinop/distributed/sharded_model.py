"""A sharded model borrowed for evaluations: its shards set, and all given back bit-identical."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchlinop.distributed import fsdp_rest
from torchlinop.distributed.forward_formulas import WithForwardFormulas
from torchlinop.distributed.sharded_layout import ShardedLayout
from torchlinop.model_state import (
    Mode,
    borrowing,
    embeddings,
    given_back,
    nothing_cached,
    refuse_renormalised_embeddings,
    refuse_unknown_mode,
    silence_gradient_hooks,
    twice_differentiable,
    warn_if_training,
)
from torchlinop.random_state import preserved_random_state, reseed


class ShardedModel:
    """Evaluates a sharded model at θ, in a given mode, with its buffers as they were.

    θ, a copy of the shards of this rank, other parameters that are trained, and the buffers are
    those of the construction: the matrix stays the same while the user goes on training. Frozen
    parameters are used where they are.
    """

    def __init__(self, module: nn.Module, layout: ShardedLayout, mode: Mode, seed: int) -> None:
        refuse_unknown_mode(mode)
        refuse_renormalised_embeddings(module)
        warn_if_training(module, mode)
        self.module = module
        self.layout = layout
        self.mode = mode
        self.seed = seed
        self.device = layout.layout.slots[0].device
        fsdp_rest.reshard(module)
        self.theta = layout.flatten(self.parameters())
        others = self._named(layout.layout.filtered)
        self._others = {name: _local(p).detach().clone() for name, p in others.items()}
        buffers = module.named_buffers(remove_duplicate=False)
        self._buffers = {name: buffer.detach().clone() for name, buffer in buffers}

    def parameters(self) -> dict[str, nn.Parameter]:
        """The selected parameters by name, sharded."""
        return self._named(self.layout.names)

    def _named(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        named = dict(self.module.named_parameters(remove_duplicate=False))
        return {name: named[name] for name in names}

    @contextmanager
    def borrowed(self, mode: Mode | None = None) -> Iterator[None]:
        """Hold the model, with θ in its shards and without gradients."""
        with ExitStack() as stack:
            stack.enter_context(borrowing)
            fsdp_rest.reshard(self.module)
            stack.enter_context(fsdp_rest.own_reductions(self.module))
            stack.enter_context(given_back(self.module))
            stack.enter_context(self._only_selected())
            stack.enter_context(_without_hooks(self.module))
            stack.enter_context(preserved_random_state(self.device))
            stack.enter_context(twice_differentiable(self.module, self.device))
            stack.enter_context(WithForwardFormulas())
            stack.enter_context(nothing_cached())
            stack.enter_context(self._at_theta())
            self.module.train((mode or self.mode) == "train")
            silence_gradient_hooks(self.module)
            for embedding in embeddings(self.module):
                embedding.sparse = False  # gradients are dense vectors here
            yield

    def place(self, stream: int) -> nn.Module:
        """The model with fresh copies of its buffers, and random numbers of (seed, stream)."""
        key = np.random.SeedSequence(self.seed, spawn_key=(stream,)).generate_state(1)
        reseed(int(key[0]), self.device)
        for name, buffer in self._buffers.items():
            prefix, _, key_in = name.rpartition(".")
            self.module.get_submodule(prefix)._buffers[key_in] = buffer.clone()
        return self.module

    def write(self, theta: Tensor) -> Tensor:
        """Put a local vector into the shards; what they hold of it, as they round it."""
        fsdp_rest.reshard(self.module)
        shards = self.layout.split(theta)
        self._write(shards)
        return self.layout.flatten(shards)

    def take_gradients(self) -> Tensor:
        """The local vector of the gradients that a backward pass has left, which are removed."""
        parameters = self.parameters()
        gradients = {name: _gradient(parameter) for name, parameter in parameters.items()}
        for parameter in self.module.parameters():
            parameter.grad = None
        return self.layout.flatten(gradients)

    def directions(self, v: Tensor) -> Callable[[nn.Parameter], Tensor | None]:
        """The shard of a local vector that belongs to a parameter; None if it is not selected."""
        shards = self.layout.split(v)
        of = {id(parameter): shards[name] for name, parameter in self.parameters().items()}
        return lambda parameter: of.get(id(parameter))

    @contextmanager
    def _at_theta(self) -> Iterator[None]:
        """What is differentiated at in the shards; what the user has put there since, bit by bit,
        afterwards.
        """
        fixed = {**self._others, **self.layout.split(self.theta)}
        before = {name: _local(p).detach() for name, p in self._named(fixed).items()}
        moved = {n: t.clone() for n, t in before.items() if not torch.equal(t, fixed[n])}
        self._write({name: fixed[name] for name in moved})
        try:
            yield
        finally:
            fsdp_rest.reshard(self.module)
            self._write({**self.layout.split(self.theta), **moved})

    def _write(self, shards: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._named(shards).items():
                _local(parameter).copy_(shards[name])

    @contextmanager
    def _only_selected(self) -> Iterator[None]:
        """Gradients of the selected parameters alone; the user's, and hooks on them, put aside."""
        selected = {id(parameter) for parameter in self.parameters().values()}
        others = [p for p in self.module.parameters() if p.requires_grad and id(p) not in selected]
        gradients = [(p, p.grad) for p in self.module.parameters() if p.grad is not None]
        for p, _ in gradients:
            p.grad = None
        for p in others:
            p.requires_grad_(False)
        try:
            yield
        finally:
            fsdp_rest.reshard(self.module)
            for p in others:
                p.requires_grad_(True)
            for p in self.module.parameters():
                p.grad = None
            for p, gradient in gradients:
                p.grad = gradient


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """No hook on a parameter is called: an optimizer in the backward pass would take a step."""
    of_parameters = [
        hooks
        for p in module.parameters()
        for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks)
        if hooks
    ]
    before = [dict(hooks) for hooks in of_parameters]
    for hooks in of_parameters:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, content in zip(of_parameters, before, strict=True):
            hooks.update(content)


def _local(parameter: nn.Parameter) -> Tensor:
    data = parameter.detach()
    return data.to_local() if isinstance(data, DTensor) else data


def _gradient(parameter: nn.Parameter) -> Tensor:
    """In the placements of the parameter; zeros where there is none."""
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(_local(parameter))
    if isinstance(gradient, DTensor) and isinstance(parameter.data, DTensor):
        return gradient.redistribute(placements=parameter.data.placements).to_local()
    return gradient
