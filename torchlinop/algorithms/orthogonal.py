"""W = Q R by columns, each projected twice; a column with no direction of its own becomes zero."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torchlinop.algorithms.basis import Basis, small_dtype, subtract
from torchlinop.algorithms.products import working_dtype
from torchlinop.space import VectorSpace

# After the columns before it are projected out, a unit vector this short lay in their span.
IN_SPAN = 0.1


def orthonormalize(space: VectorSpace, W: Tensor, threshold: Tensor | float) -> Tensor:
    """Replace W (n, w) by Q, and return R (w, w) with W = Q R.

    A column that is no longer than ``threshold`` once the columns before it are projected out
    becomes zero, and so does its row of R. Nothing is read back from the device.
    """
    return factored(space, W, threshold)[0]


def factored(space: VectorSpace, W: Tensor, threshold: Tensor | float) -> tuple[Tensor, Tensor]:
    """The same, with the lengths (w,) of the columns that became zero, and 0 for the others."""
    w = W.shape[1]
    R = torch.zeros(w, w, dtype=small_dtype(W.dtype), device=W.device)
    lost = torch.zeros(w, dtype=torch.float64, device=W.device)
    for i in range(w):
        q = W[:, i : i + 1]
        for _ in range(2 if i else 0):  # "Twice is enough" (Parlett 1980, section 6.9)
            h = space.inner(W[:, :i], q)
            subtract(q, W[:, :i], h)
            R[:i, i : i + 1] += h
        beta = space.norm(q)[0]
        alive = beta > threshold
        q.mul_(torch.where(alive, 1 / beta, 0.0).to(real_dtype(W)))
        R[i, i] = torch.where(alive, beta, 0.0)
        lost[i] = torch.where(alive, 0.0, beta)
    return R, lost


def extended(
    space: VectorSpace, V: Tensor, threshold: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """``w = V c + q s`` for the last column w of V (n, j + 1), which q replaces; c, s (1, 1), lost.

    The columns before are orthonormal, and c is to be rounding error: a second pass. So no digits
    cancel in ``s² = ‖w‖² - ‖c‖²``, and one inner product tells all: V is read twice. If w is no
    longer than ``threshold``, or lies in the span of the others, q and s are zero, and ``lost``
    (1,) is the length that went.
    """
    w, before = V[:, -1:], V[:, :-1]
    products = space.inner(V, w)
    c, square = products[:-1], products[-1].real
    length = square.sqrt()
    rest = (square - torch.linalg.vector_norm(c) ** 2).clamp_min(0).sqrt()
    long_enough = length > threshold
    alive = long_enough & (rest > IN_SPAN * length)
    subtract(w, before, c)
    w.mul_(torch.where(alive, 1 / rest, 0.0).to(real_dtype(w)))
    s = torch.where(alive, rest, 0.0).to(c.dtype)
    lost = torch.where(alive, 0.0, torch.where(long_enough, rest, length))
    return torch.where(long_enough, c, 0.0), s[:, None], lost


def real_dtype(W: Tensor) -> torch.dtype:
    """The real dtype of the entries of W."""
    return W.real.dtype if W.is_complex() else W.dtype


def random_block(space: VectorSpace, columns: int, seed: int, draw: int) -> Tensor:
    """Gaussian columns (n, columns) of the stream ``draw`` of ``seed``, at least in float32."""
    stream = np.random.SeedSequence(seed, spawn_key=(draw,)).generate_state(1, np.uint64)
    return space.random(columns, int(stream[0])).to(working_dtype(space.dtype))


def removed(space: VectorSpace, V: Tensor, W: Tensor) -> Tensor:
    """``W -= V H`` in place, and ``H = V^H W``."""
    H = space.inner(V, W)
    subtract(W, V, H)
    return H


def complete(basis: Basis, size: int, Q: Tensor, columns: int, *, seed: int, draw: int) -> Tensor:
    """Q (n, w), orthonormal and orthogonal to the basis, with ``columns`` random ones added.

    They make up for a Krylov space that has become invariant.
    """
    if not columns:
        return Q
    Z = random_block(basis.space, columns, seed, draw)
    for _ in range(3):  # the first may leave little of a vector, if the basis nearly fills space
        if size:
            basis.project(Z, size)
        if Q.shape[1]:
            subtract(Z, Q, basis.space.inner(Q, Z))
        orthonormalize(basis.space, Z, 0.0)
    return torch.cat([Q, Z], dim=1)
