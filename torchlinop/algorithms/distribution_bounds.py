"""The least and the most weight at most x that measures with the same 2m moments can have."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 256  # points at once: as many matrices (m + 1, m + 1)


def sharp_bounds(
    nodes: Tensor, weights: Tensor, residuals: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """Bounds below and above on ``μ((-∞, x])``, of any shape of x, from a Gauss quadrature (m,).

    Of all measures with these moments, the quadrature that has x itself as a node has the least
    weight below x and the most up to x (Chebyshev, Markov and Stieltjes; Krein and Nudelman 1977).
    Its matrix is T with one more row, chosen to have the eigenvalue x; in the eigenvectors of T an
    arrow ``[[θ, r], [rᵀ, ·]]``, r the residuals of the Ritz pairs with alternating signs. Nodes
    without residual are eigenvalues, and stay. Costs an eigendecomposition (m + 1) a point.
    """
    points = x.reshape(-1).double()
    certain = residuals == 0
    fixed = (weights * certain * (nodes <= points[:, None])).sum(1)
    theta, w, r = (t[~certain] for t in (nodes, weights, residuals))
    if not len(theta):
        return fixed.reshape(x.shape), fixed.reshape(x.shape)
    pairs = [_with_node(theta, w, r, chunk) for chunk in points.split(_CHUNK)]
    low, high = (torch.cat(side) for side in zip(*pairs, strict=True))
    rounding = len(nodes) * torch.finfo(torch.float64).eps  # of the sums
    low, high = (fixed + low - rounding).clamp_min(0), (fixed + high + rounding).clamp_max(1)
    return low.reshape(x.shape), high.reshape(x.shape)


def _with_node(theta: Tensor, w: Tensor, r: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The weight below x, and that up to x, of the quadrature with the node x, (g,) each."""
    m = len(theta)
    # Eigenvectors of a tridiagonal matrix have first and last entries of alternating signs.
    signed = r * (-1.0) ** torch.arange(m, dtype=torch.float64)
    gaps = theta - x[:, None]
    gaps = gaps.where(gaps != 0, torch.finfo(torch.float64).eps * theta.abs().max())
    corner = x + (r**2 / gaps).sum(1)
    arrow = torch.diag_embed(torch.cat([theta.expand(len(x), m), corner[:, None]], 1))
    arrow[:, :m, m] = arrow[:, m, :m] = signed
    Y = torch.linalg.eigh(arrow)[1]  # ascending
    cumulated = (w.sqrt() @ Y[:, :m]).square().cumsum(1)
    below = (theta < x[:, None]).sum(1, keepdim=True)  # interlacing: so many eigenvalues, then x
    padded = torch.cat([torch.zeros(len(x), 1, dtype=torch.float64), cumulated], 1)
    return padded.gather(1, below)[:, 0], padded.gather(1, below + 1)[:, 0]
