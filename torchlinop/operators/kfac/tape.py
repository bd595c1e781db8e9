"""One forward pass with what K-FAC's layers got and gave, and the gradients at their outputs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from torchlinop.batches import Batch, count_samples
from torchlinop.errors import BatchError, LossShapeError
from torchlinop.from_model import OutputObjective
from torchlinop.operators.kfac.features import Features
from torchlinop.operators.kfac.layers import KroneckerLayer, Layer, ScaleLayer

log = logging.getLogger("torchlinop")

_ENTRIES_AT_ONCE = 2**24  # of vectors and gradients at layer outputs, in one backward pass


@dataclass(frozen=True)
class Call:
    """One application of a layer."""

    layer: Layer
    x: Tensor  # the input
    edge: GradientEdge  # of the output, which later operations may overwrite
    output: Tensor  # on "meta": the output's shape and dtype


@dataclass(frozen=True)
class Tape:
    """A batch that went through the model."""

    outputs: Tensor
    theta: Tensor  # (n,), the leaf of the graph
    samples: int  # N
    counted: Tensor | None  # (N, T), the attention mask, if there is one
    calls: Mapping[str, Sequence[Call]]  # by the name of the layer
    like: Tensor = field(repr=False)  # of the dtype and device that factors have

    @property
    def is_finite(self) -> bool:
        """Whether what the layers got, and the outputs, hold neither NaN nor infinity."""
        seen = [self.outputs, *(call.x for calls in self.calls.values() for call in calls)]
        return all(bool(torch.isfinite(tensor).all()) for tensor in seen)

    def without(self, layers: Collection[str]) -> Tape:
        """The same without the calls of some layers."""
        return replace(self, calls={n: c for n, c in self.calls.items() if n not in layers})

    def features(self, layer: KroneckerLayer) -> Features:
        """The inputs a of all calls of the layer, their positions side by side."""
        return reduce(
            lambda one, other: one.followed_by(other),
            [
                layer.features(self._cast(call.x), self.samples, self.counted)
                for call in self.calls[layer.name]
            ],
        )

    def normalised(self, layer: ScaleLayer) -> Tensor:
        """x̂ of all calls: (N, S, d)."""
        calls = self.calls[layer.name]
        return torch.cat([self._cast(layer.normalised(c.x, self.samples)) for c in calls], 1)

    def gradients(self, V: Tensor) -> dict[str, Tensor]:
        """``(∂f/∂y)ᵀ v`` for vectors (k, *outputs.shape): (k, N, S, d_out) by layer name."""
        calls = [call for calls in self.calls.values() for call in calls]
        if not calls:
            return {}
        pulled = iter(self._pulled(calls, V.to(self.outputs.dtype)))
        return {
            name: torch.cat([self._by_position(c, next(pulled)) for c in of_layer], 2)
            for name, of_layer in self.calls.items()
        }

    def refuse_other_axes(self) -> None:
        """Raise KFACCoverageError unless the inputs of all layers begin with the samples."""
        for calls in self.calls.values():
            for call in calls:
                call.layer.refuse_other_axes(call.x, self.samples)

    def vectors_at_once(self) -> int:
        """How many vectors one backward pass takes, by what they and the gradients need."""
        of_layers = sum(call.output.numel() for calls in self.calls.values() for call in calls)
        return max(1, _ENTRIES_AT_ONCE // max(1, self.outputs.numel() + of_layers))

    def parameter_gradient(self, v: Tensor) -> Tensor:
        """``Jᵀ v`` for one vector in the shape of the outputs: (n,)."""
        (gradient,) = torch.autograd.grad(
            self.outputs, self.theta, v, retain_graph=True, materialize_grads=True
        )
        return gradient

    def _by_position(self, call: Call, g: Tensor) -> Tensor:
        g = call.layer.by_position(self._cast(g), self.samples)
        layer = call.layer
        if isinstance(layer, KroneckerLayer):
            return layer.without_padding(g, call.x, self.samples)
        return g

    def _pulled(self, calls: Sequence[Call], V: Tensor) -> list[Tensor]:
        def pull(v: Tensor, batched: bool) -> list[Tensor]:
            gradients = torch.autograd.grad(
                self.outputs,
                [call.edge for call in calls],
                v,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=batched,
            )
            shape = v.shape[:1] if batched else ()
            return [
                torch.zeros(*shape, *c.output.shape, dtype=c.output.dtype, device=c.x.device)
                if g is None
                else g
                for c, g in zip(calls, gradients, strict=True)
            ]

        if len(V) > 1:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "There is a performance drop")
                    return pull(V, batched=True)
            except RuntimeError as error:  # some operation has no batching rule
                log.info("vectors are backpropagated one by one: %s", error)
        columns = [pull(v, batched=False) for v in V]
        return [torch.stack(of_call) for of_call in zip(*columns, strict=True)]

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.like) if tensor.is_floating_point() else tensor


@contextmanager
def recorded(
    objective: OutputObjective, b: int, batch: Batch, layers: Sequence[Layer]
) -> Iterator[Tape]:
    """Put the batch through the model; the hooks are gone afterwards, whatever happens.

    Raises:
        LossShapeError: the outputs do not depend on the parameters.
        BatchError: the attention mask is no mask.
    """
    number = count_samples(batch)
    calls: dict[str, list[Call]] = {}
    recording = True

    def spread(layer: Layer) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = _input(args, kwargs)
            if x is None or not number:
                return None
            spread_x = layer.input_at_all_samples(x, number)
            if args:
                return (spread_x, *args[1:]), kwargs
            return args, {**kwargs, next(iter(kwargs)): spread_x}

        return hook

    def record(layer: Layer) -> Callable[..., Any]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: object
        ) -> Tensor | None:
            x = _input(args, kwargs)
            # A layer called with no rows, as an expert without tokens, has done nothing.
            if x is None or not x.numel() or not isinstance(y, Tensor) or not y.requires_grad:
                return None
            # An operation in place on a view would rewrite its graph, without this edge.
            y = y.clone() if y._is_view() else y
            if recording:
                call = Call(layer, x.detach(), get_gradient_edge(y), y.detach().to("meta"))
                calls.setdefault(layer.name, []).append(call)
            return y

        return hook

    # Borrowing restores everything about the modules, hooks included.
    with objective.evaluating(b, batch, objective.function.outputs) as f:
        for layer in layers:
            if layer.shared:
                layer.module.register_forward_pre_hook(spread(layer), with_kwargs=True)
            layer.module.register_forward_hook(record(layer), with_kwargs=True, prepend=True)
        theta = objective.theta.detach().requires_grad_()
        outputs = f(theta)
        recording = False  # checkpointed segments run again during backward passes
        if not outputs.requires_grad:
            raise LossShapeError(
                "the outputs do not require grad: was forward_fn computed under no_grad, or "
                "detached, or do the selected parameters not enter it? Return outputs with a graph"
            )
        samples = number if number and len(outputs) % number == 0 else len(outputs)
        yield Tape(outputs, theta, samples, _mask(batch, samples), calls, objective.theta)


def numbered(objective: OutputObjective) -> Iterator[tuple[int, Batch, float]]:
    """The batches with their numbers and shares; to be closed, if left before the end."""
    for b, (batch, share) in enumerate(objective.data):
        yield b, batch, share


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first argument of a module, if it is a tensor."""
    x = args[0] if args else next(iter(kwargs.values()), None)
    return x if isinstance(x, Tensor) else None


def _mask(batch: Batch, samples: int) -> Tensor | None:
    """Which tokens are no padding (N, T), if the batch says so.

    None where another sequence, of a decoder, might be mistaken for the one that is masked.

    Raises:
        BatchError: it holds other numbers than zeros and ones.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not (isinstance(mask, Tensor) and mask.ndim == 2 and len(mask) == samples):
        return None
    if not ((mask == 0) | (mask == 1)).all():
        raise BatchError(
            "expected an attention_mask of zeros and ones, got numbers from "
            f"{mask.min().item():.3g} to {mask.max().item():.3g}; give the model other masks "
            "under another key of the batch"
        )
    labels = batch.get("labels")
    of_tokens = isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point()
    other = of_tokens and labels.shape != mask.shape
    return None if other or any(str(key).startswith("decoder_") for key in batch) else mask
