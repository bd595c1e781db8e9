"""Which entries of a distributed tensor this rank holds, by its placements on the mesh."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from torchlinop.distributed.piece import Piece, Ranges
from torchlinop.errors import ParameterError


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
    first, last = [], []
    for mesh_dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            continue
        if type(placement).__name__ == "_StridedShard":  # private of torch: known by its name
            dim = placement.dim % tensor.ndim
            after = [p for p in tensor.placements[mesh_dim + 1 :] if _shards(p, dim, tensor.ndim)]
            sizes = tensor.device_mesh.shape[mesh_dim + 1 :]
            pairs = zip(tensor.placements[mesh_dim + 1 :], sizes, strict=True)
            factor = 1
            for p, size in pairs:
                factor *= size if _shards(p, dim, tensor.ndim) else 1
            if not after or factor != placement.split_factor:
                raise ParameterError(_unknown(name, tensor, "the strides are of no known split"))
            last.insert(0, (dim, mesh_dim))
        elif type(placement) is Shard:
            first.append((placement.dim % tensor.ndim, mesh_dim))
        else:
            raise ParameterError(_unknown(name, tensor, f"{placement!r} is neither"))
    return first + last


def _shards(placement: object, dim: int, ndim: int) -> bool:
    own = getattr(placement, "dim", None)
    return own is not None and own % ndim == dim


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
