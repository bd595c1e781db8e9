"""f at Ritz values: finite numbers, or an error that names the value where they are not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchlinop.errors import NonFiniteError, VectorError

ScalarFunction = Callable[[Tensor], Tensor]  # entrywise, float64


def values_at(f: ScalarFunction, nodes: Tensor, noise: float) -> Tensor:
    """``f(θ)`` in float64 of all nodes (m,); f(0) where f is not finite, but θ within noise of 0.

    ``noise`` is relative to the largest |θ|. So √ and its like serve for semidefinite matrices,
    whose zero eigenvalues are computed as ±1e-17.

    Raises:
        VectorError: f does not act entrywise; NonFiniteError: f is not finite at some node.
    """
    values = f(nodes)
    if not isinstance(values, Tensor) or values.shape != nodes.shape or values.is_complex():
        raise VectorError(
            "expected f to map a real tensor (m,) to another, entry by entry; "
            f"got {getattr(values, 'shape', type(values).__name__)} for shape "
            f"{tuple(nodes.shape)}; pass torch.exp, say"
        )
    values = values.double()
    tiny = nodes.abs() <= noise * nodes.abs().max()
    values = values.where(torch.isfinite(values) | ~tiny, f(torch.zeros_like(nodes)).double())
    if not torch.isfinite(values).all():
        worst = float(nodes[~torch.isfinite(values)][0])
        raise NonFiniteError(
            f"f is not finite at the Ritz value {worst:.6g}; "
            "shift the operator by op.shift(damping), or pass an f defined on its spectrum"
        )
    return values


def moved(f: ScalarFunction, nodes: Tensor, values: Tensor, distance: float) -> Tensor:
    """``|f(θ + distance) − f(θ)|`` of all nodes (m,), given the values; 0 where f is not finite.

    What rounding does to f(A), if it moves eigenvalues so far.
    """
    change = (f(nodes + distance).double() - values).abs()
    return change.where(torch.isfinite(change), 0.0)
