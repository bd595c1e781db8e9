"""The edge of an operator: what a caller passes is checked, what they get is their own memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchlinop.articles import kind_of
from torchlinop.errors import OptionError, VectorError
from torchlinop.model_state import full_precision
from torchlinop.space import VectorSpace

BlockMap = Callable[[Tensor], Tensor]


def of_block(multiply: BlockMap, space: VectorSpace, rows: int, V: Tensor) -> Tensor:
    """``multiply(V)`` (rows, k) for a block (n, k) of this space.

    Raises:
        VectorError: V has another shape, dtype or device than a block of this space.
    """
    _refuse_other_libraries(V)
    if V.ndim != 2 or V.shape[0] != space.local_size:
        raise VectorError(
            f"expected a block of shape ({space.local_size}, k), got {tuple(V.shape)}; "
            "pass vectors as columns"
        )
    return _product(multiply, space, rows, V)


def of_vector(multiply: BlockMap, space: VectorSpace, rows: int, v: Tensor) -> Tensor:
    """``multiply`` of a vector (n,) of this space, as a vector (rows,).

    Raises:
        VectorError: v has another shape, dtype or device than a vector of this space.
    """
    _refuse_other_libraries(v)
    if v.shape != (space.local_size,):
        raise VectorError(
            f"expected a vector of shape ({space.local_size},), got {tuple(v.shape)}; "
            "pass a block of columns to matmat"
        )
    return _product(multiply, space, rows, v[:, None])[:, 0]


def _product(multiply: BlockMap, space: VectorSpace, rows: int, V: Tensor) -> Tensor:
    if V.dtype != space.dtype or V.device != space.device:
        raise VectorError(
            f"expected {space.dtype} on {space.device}, got {V.dtype} on {V.device}; "
            f"pass v.to({space.dtype}, device={str(space.device)!r})"
        )
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return _product(multiply, space, rows, V.clone())
    if V.shape[1] == 0:
        return V.new_empty(rows, 0)
    with torch.no_grad(), full_precision(space.device):
        AV = multiply(V.clone() if V.is_inference() else V.detach())
        # A product that hands its input through would let callers overwrite it.
        return AV.clone() if 0 <= AV.data_ptr() - V.data_ptr() < V.nbytes else AV


def _refuse_other_libraries(v: object) -> None:
    if not isinstance(v, Tensor):
        raise VectorError(
            f"expected a torch tensor, got {kind_of(v)}; pass torch.from_numpy(v), or "
            "multiply by as_linear_operator(operator)"
        )


def dense(multiply: BlockMap, space: VectorSpace, rows: int, chunk: int) -> Tensor:
    """All columns of a map of this space, (rows, n), ``chunk`` unit vectors at a time."""
    if chunk < 1:
        raise OptionError(f"expected chunk to be at least 1, got {chunk}; leave it out")
    columns = torch.empty(rows, space.size, dtype=space.dtype, device=space.device)
    for start in range(0, space.size, chunk):
        stop = min(start + chunk, space.size)
        columns[:, start:stop] = multiply(space.unit_vectors(start, stop))
    return columns
