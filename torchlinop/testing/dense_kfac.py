"""K-FAC by its definition, in loops over samples, positions and entries of the kernel."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# (outputs of one sample (O,), number of the sample) -> M_n (O, O), Σ_n M_n being what stands
# between the Jacobians: the Hessian of the loss, or a sum of outer products.
Metric = Callable[[Tensor, int], Tensor]


@dataclass
class LayerFactors:
    """A and B of one layer."""

    A: Tensor  # (d_in, d_in), or with the constant 1 as the last feature
    B: Tensor  # (d_out, d_out)


def layer_factors(
    model: nn.Module,
    layer: nn.Module,
    samples: Sequence[Tensor],
    metric: Metric,
    *,
    reduce: bool = False,
    joint: bool = False,
) -> LayerFactors:
    """One sample at a time: A averages ``a aᵀ``, B adds up ``Jᵀ M_n J`` at every position."""
    A: list[Tensor] = []
    B: list[Tensor] = []
    for n, x in enumerate(samples):
        inputs, outputs, f = _tapped(model, layer, x)
        M = metric(f.detach().flatten(), n)
        a = torch.cat([_positions(layer, one) for one in inputs])  # (S, groups, d_in)
        if joint:
            a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
        J = torch.cat([_jacobian(layer, f, y) for y in outputs], 1)  # (O, S, d_out)
        if reduce:
            a, J = a.mean(0, keepdim=True), J.sum(1, keepdim=True)
        A += [torch.outer(a_sg, a_sg) for a_s in a for a_sg in a_s]
        B += [J[:, s].T @ M @ J[:, s] for s in range(J.shape[1])]
    per_sample = len(A) // len(samples)
    return LayerFactors(torch.stack(A).sum(0) / (len(samples) * per_sample), torch.stack(B).sum(0))


def dense_kfac(
    model: nn.Module,
    samples: Sequence[Tensor],
    metric: Metric,
    *,
    reduce: bool = False,
    joint: bool = False,
) -> Tensor:
    """The matrix (n, n) of a model of linear layers and convolutions, in its parameters' order.

    ``B ⊗ A`` for weights, row-major, B for biases; jointly ``B ⊗ A`` for ``[W, b]``.
    """
    n = sum(p.numel() for p in model.parameters())
    K = torch.zeros(n, n, dtype=next(model.parameters()).dtype)
    start = 0
    for layer in model.modules():
        if not list(layer.parameters(recurse=False)):
            continue
        factors = layer_factors(model, layer, samples, metric, reduce=reduce, joint=False)
        d_out, d_in = len(factors.B), len(factors.A)
        W = torch.arange(start, start + d_out * d_in)
        K[W[:, None], W] = torch.kron(factors.B, factors.A)
        start += len(W)
        if layer.bias is not None:
            b = torch.arange(start, start + d_out)
            K[b[:, None], b] = factors.B
            start += d_out
        if joint and layer.bias is not None:
            factors = layer_factors(model, layer, samples, metric, reduce=reduce, joint=True)
            both = torch.cat([W.view(d_out, d_in), b[:, None]], 1).flatten()
            K[both[:, None], both] = torch.kron(factors.B, factors.A)
    return K


def _tapped(
    model: nn.Module, layer: nn.Module, x: Tensor
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """What goes into the layer and comes out of it, at every call, and the model's outputs."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        inputs.append(args[0].detach())
        outputs.append(y)
        return y.clone()  # what later operations may overwrite

    handle = layer.register_forward_hook(hook)
    try:
        return inputs, outputs, model(x[None])[0]
    finally:
        handle.remove()


def _jacobian(layer: nn.Module, f: Tensor, y: Tensor) -> Tensor:
    """(O, S, d_out)."""
    rows = [torch.autograd.grad(value, y, retain_graph=True)[0] for value in f.flatten()]
    channels_last = [row.movedim(1, -1) if _is_convolution(layer) else row for row in rows]
    return torch.stack([row.reshape(-1, row.shape[-1]) for row in channels_last])


def _is_convolution(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _positions(layer: nn.Module, x: Tensor) -> Tensor:
    """(S, groups, d_in)."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return x.reshape(-1, 1, x.shape[-1])
    sizes, out = x.shape[2:], layer(x).shape[2:]
    per_group = layer.in_channels // layer.groups
    patches = []
    for place in itertools.product(*map(range, out)):
        groups = []
        for g in range(layer.groups):
            a = []
            for c in range(g * per_group, (g + 1) * per_group):
                for offset in itertools.product(*map(range, layer.kernel_size)):
                    at = [
                        _source(layer, axis, place[axis], offset[axis], sizes[axis])
                        for axis in range(len(sizes))
                    ]
                    inside = None not in at
                    a.append(x[(0, c, *at)] if inside else x.new_zeros(()))
            groups.append(torch.stack(a))
        patches.append(torch.stack(groups))
    return torch.stack(patches)


def _source(
    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, axis: int, place: int, offset: int, size: int
) -> int | None:
    """Where a place of the kernel reads the input along one axis; None in zero padding."""
    if isinstance(layer.padding, str):
        total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        padding = total // 2 if layer.padding == "same" else 0
    else:
        padding = int(layer.padding[axis])
    i = place * layer.stride[axis] + offset * layer.dilation[axis] - padding
    if 0 <= i < size:
        return i
    return {
        "zeros": None,
        "circular": i % size,
        "replicate": min(max(i, 0), size - 1),
        "reflect": -i if i < 0 else 2 * (size - 1) - i,
    }[layer.padding_mode]
