"""Densities on a grid: points with weights, each smoothed by a Gaussian of one width."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from torchlinop.errors import OptionError, VectorError

Bandwidth = float | Literal["range/m"] | None


def smoothed_measure(points: Tensor, weights: Tensor, grid: Tensor, sigma: float) -> Tensor:
    """Means of ``Σ w_j N(points_j, sigma²)`` over the cells around the grid points, (g,)."""
    edges = _edges(grid)
    below = torch.special.ndtr((edges[:, None] - points) / sigma) @ weights
    density: Tensor = below.diff().clamp_min_(0) / edges.diff()  # rounding may leave -1e-17
    return density


def _edges(grid: Tensor) -> Tensor:
    """Midpoints between grid points, and half a step beyond the ends, (g + 1,)."""
    x = torch.as_tensor(grid, dtype=torch.float64, device="cpu")
    if x.ndim != 1 or len(x) < 2 or not (x.diff() > 0).all():
        raise VectorError(
            f"expected an ascending grid of two points or more, got shape {tuple(x.shape)}; "
            "pass torch.linspace(low, high, 1000)"
        )
    middles = (x[1:] + x[:-1]) / 2
    return torch.cat([2 * x[:1] - middles[:1], middles, 2 * x[-1:] - middles[-1:]])


def refuse_bandwidth(sigma: object) -> None:
    """Raise OptionError for what is no `Bandwidth`."""
    if isinstance(sigma, int | float) and not isinstance(sigma, bool):
        fits = 0 < sigma < math.inf
    else:
        fits = sigma is None or (isinstance(sigma, str) and sigma == "range/m")
    if not fits:
        raise OptionError(
            f'expected sigma to be a positive number, None or "range/m", got {sigma!r}; '
            "leave it out"
        )
