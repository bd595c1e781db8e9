"""Which entries of a distributed tensor this rank holds, by its placements on the mesh."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from torchlinop.errors import ParameterError
from torchlinop.piece import Piece, Ranges


def piece_of(name: str, tensor: Tensor, offset: int) -> Piece:
    """What this rank holds of a tensor that begins at ``offset`` in the global flat vector.

    A plain tensor is held whole by every rank.

    Raises:
        ParameterError: it is sharded in a way that is not known here.
    """
    if not isinstance(tensor, DTensor):
        return Piece.whole(offset, tuple(tensor.shape))
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        raise ParameterError(
            f"parameter {name!r} is on a device mesh that this rank is not part of; call this on "
            "the ranks of the mesh, with their process group"
        )
    held = [torch.arange(m) for m in tensor.shape]
    for dim, mesh_dim in _in_order_of_splits(name, tensor):
        chunks = held[dim].tensor_split(_edges(len(held[dim]), tensor.device_mesh.size(mesh_dim)))
        held[dim] = chunks[coordinate[mesh_dim]]
    piece = Piece(offset, tuple(tensor.shape), tuple(_ranges(indices) for indices in held))
    if piece.local_shape != tuple(tensor.to_local().shape):
        raise ParameterError(_unknown(name, tensor, "the local shape does not follow from it"))
    return piece


def _in_order_of_splits(name: str, tensor: DTensor) -> list[tuple[int, int]]:
    """(dimension of the tensor, dimension of the mesh), as the tensor was split.

    From left to right, but for strided shards: these were made last (FSDP of a tensor-parallel
    parameter splits what is left to split), and stand to the left of those made before.
    """
    first: list[tuple[int, int]] = []
    last: list[tuple[int, int]] = []
    for mesh_dim, placement in enumerate(tensor.placements):
        strided = type(placement).__name__ == "_StridedShard"  # private of torch: known by name
        if isinstance(placement, Replicate):
            continue
        if not strided and type(placement) is not Shard:
            raise ParameterError(_unknown(name, tensor, f"{placement!r} is neither"))
        split = (_dim(placement, tensor), mesh_dim)
        (last if strided else first).append(split)
        factor = getattr(placement, "split_factor", None)
        if strided and factor != _split_before(tensor, *split):
            raise ParameterError(_unknown(name, tensor, "the strides are of no known split"))
    return first + last[::-1]


def _split_before(tensor: DTensor, dim: int, mesh_dim: int) -> int:
    """In how many parts placements to the right have split this dimension."""
    after = range(mesh_dim + 1, tensor.device_mesh.ndim)
    return math.prod(
        tensor.device_mesh.size(m) for m in after if _dim(tensor.placements[m], tensor) == dim
    )


def _dim(placement: Placement, tensor: DTensor) -> int:
    """The dimension of the tensor that a placement splits; -1 for none."""
    dim: int | None = getattr(placement, "dim", None)
    return -1 if dim is None else dim % tensor.ndim


def _edges(length: int, chunks: int) -> list[int]:
    """Where ``torch.chunk`` cuts: the last chunks may be shorter, or empty."""
    rows = -(-length // chunks)
    return [min(length, rows * c) for c in range(1, chunks)]


def _ranges(indices: Tensor) -> Ranges:
    breaks = ((indices.diff() != 1).nonzero()[:, 0] + 1).tolist() if len(indices) else []
    parts = indices.tensor_split(breaks)
    return tuple((int(part[0]), int(part[-1]) + 1) for part in parts if len(part)) or ((0, 0),)


def _unknown(name: str, tensor: DTensor, why: str) -> str:
    return (
        f"parameter {name!r} of shape {tuple(tensor.shape)} has placements "
        f"{tuple(tensor.placements)} on a mesh {tuple(tensor.device_mesh.shape)}, a sharding that "
        f"is not known here ({why}); shard it with Shard and Replicate, by fully_shard or "
        "parallelize_module, or leave it out with param_filter"
    )
