"""What several ranks hold of a sharded model has to be the same on all of them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchlinop.distributed.agreement import agreed, divergence, gathered
from torchlinop.distributed.placements import piece_of
from torchlinop.distributed.rank_data import DataRanks
from torchlinop.errors import ProcessGroupError
from torchlinop.fingerprint import fingerprint
from torchlinop.piece import Piece

# Each rank of a tensor-parallel group has trained what all of them hold by gradients of its own,
# rounded in an order of its own. Tensors that were drawn twice differ by about their norm.
DRIFT = 1e-4


def refuse_different_replicas(
    module: nn.Module, group: dist.ProcessGroup, *, drift: float = 0.0, buffers: bool = True
) -> None:
    """Compare fingerprints of all that more than one rank holds: two exchanges of short messages.

    Parameters, also frozen ones, are compared piece by piece. With a ``drift``, sums and norms may
    differ by as much, relative to the norm.

    Raises:
        ProcessGroupError: they differ, on all ranks.
    """
    with agreed(group):
        tensors = {name: parameter.data for name, parameter in module.named_parameters()}
        tensors |= dict(module.named_buffers()) if buffers else {}
        pieces = {name: piece_of(name, tensor, 0) for name, tensor in tensors.items()}
    holders = Counter(piece for theirs in gathered(pieces, group) for piece in theirs.items())
    held = {
        (name, piece): _Digest.of(tensors[name])
        for name, piece in pieces.items()
        if holders[name, piece] > 1
    }
    first: dict[tuple[str, Piece], tuple[int, _Digest]] = {}
    for rank, theirs in enumerate(gathered(held, group)):
        for (name, piece), digest in theirs.items():
            other, expected = first.setdefault((name, piece), (rank, digest))
            if not digest.same(expected, drift):
                raise ProcessGroupError(
                    f"the ranks hold different values of {name} (ranks {other} and {rank}), where "
                    "they should be replicas; load one checkpoint on all of them, build the model "
                    "with the same seed, or broadcast parameters and buffers "
                    "(torch.distributed.broadcast), before the operator is built"
                )


def refuse_different_vectors(V: Tensor, ranks: DataRanks, group: dist.ProcessGroup) -> None:
    """Compare the local blocks (local_size, k) of replicas, if a mesh has them: one all-reduce.

    Raises:
        DivergenceError: they differ, on all ranks.
    """
    if len(ranks.groups) < 2 or ranks.size != group.size():  # of what is not HSDP alone
        return
    _, shards = ranks.groups
    number = (fingerprint(V) & 0xFFFFFFFF).double()
    numbers = number.new_full((2, shards.size()), math.inf)
    numbers[:, dist.get_rank(shards)] = torch.stack([number, -number])
    dist.all_reduce(numbers, dist.ReduceOp.MIN, group)
    if bool((numbers[0] != -numbers[1]).any()):
        raise divergence()


@dataclass(frozen=True)
class _Digest:
    """Of the entries of a tensor that a rank holds."""

    bits: int
    total: float
    norm: float

    @classmethod
    def of(cls, tensor: Tensor) -> _Digest:
        held = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().flatten()
        norm, total = _norm_and_sum(held)
        return cls(int(fingerprint(held)), total, norm)

    def same(self, other: _Digest, drift: float) -> bool:
        allowed = drift * max(self.norm, other.norm)
        off = max(abs(self.total - other.total), abs(self.norm - other.norm))
        return self.bits == other.bits or off < allowed < math.inf


def _norm_and_sum(flat: Tensor) -> tuple[float, float]:
    numbers = torch.view_as_real(flat).flatten() if flat.is_complex() else flat
    parts = [part.double() for part in numbers.split(2**18)] or [numbers.double()]
    sums = torch.stack([torch.stack([part.square().sum(), part.sum()]) for part in parts]).sum(0)
    square, total = sums.tolist()
    return math.sqrt(square), total
