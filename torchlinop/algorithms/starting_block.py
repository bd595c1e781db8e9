"""X^H X = I to start from: columns given, and random ones where they are too few or dependent."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinop.algorithms.basis import Basis
from torchlinop.algorithms.eigen_result import EigenResult
from torchlinop.algorithms.orthogonal import complete, orthonormalize, random_block
from torchlinop.algorithms.products import working_dtype
from torchlinop.errors import VectorError
from torchlinop.operators.base import CurvatureOperator
from torchlinop.space import VectorSpace

_DEPENDENT = 1e-3  # of the longest column: a start is no worse for a random one in its place


def starting_block(
    op: CurvatureOperator, v0: Tensor | EigenResult | None, columns: int, seed: int
) -> Tensor:
    """Orthonormal columns (n, columns) in working precision, of which the first span v0.

    Raises:
        VectorError: v0 is of another space, too wide, zero, or not finite.
    """
    V = random_block(op.space, columns, seed, 0) if v0 is None else _of_space(op, v0, columns)
    norms = op.space.norm(V)
    if not bool(torch.isfinite(norms).all()) or (v0 is not None and not bool(norms.any())):
        raise VectorError("expected a finite v0 other than zero; leave it out for a random start")
    return independent(op.space, V, _DEPENDENT * norms.max(), columns, seed=seed, draw=0)


def independent(
    space: VectorSpace, V: Tensor, threshold: Tensor | float, columns: int, *, seed: int, draw: int
) -> Tensor:
    """An orthonormal basis (n, columns) of the span of V, which is overwritten, and more.

    Columns no longer than ``threshold`` outside of the span of those before are replaced by
    random ones. The host waits for the device once.
    """
    R = orthonormalize(space, V, threshold)
    V = V[:, R.diagonal().real > 0]
    empty = Basis(space, V, 0, dtype=None, device=None)
    return complete(empty, 0, V, columns - V.shape[1], seed=seed, draw=draw).mT.contiguous().mT


def refuse_no_start(v0: object) -> None:
    """Raise VectorError for what is no vector, no block, no earlier result and not None."""
    if not (v0 is None or isinstance(v0, Tensor | EigenResult)):
        raise VectorError(
            f"expected v0 to be a tensor or an EigenResult, got {type(v0).__name__}; "
            "pass torch.as_tensor(v0), or leave it out"
        )


def _of_space(op: CurvatureOperator, v0: Tensor | EigenResult, columns: int) -> Tensor:
    refuse_no_start(v0)
    working = working_dtype(op.dtype)
    V = v0.eigenvectors[:, :columns] if isinstance(v0, EigenResult) else v0
    V = V[:, None] if V.ndim == 1 else V
    rows = op.space.local_size
    fits = V.ndim == 2 and len(V) == rows and 1 <= V.shape[1] <= columns
    if not fits or V.device != op.device or V.dtype not in (op.dtype, working):
        raise VectorError(
            f"expected v0 of shape ({rows},) or ({rows}, b) with b from 1 to {columns}, in "
            f"{op.dtype} on {op.device}, got {tuple(V.shape)} in {V.dtype} on {V.device}; "
            "pass op.space.random(1), say"
        )
    return V.detach().to(working, copy=True)
