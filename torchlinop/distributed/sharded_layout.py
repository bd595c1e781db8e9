"""The parameters of a sharded model as one flat vector per rank, known by global indices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchlinop.distributed.agreement import agreed, gathered
from torchlinop.distributed.placements import piece_of
from torchlinop.distributed.sharded_space import ShardedSpace
from torchlinop.errors import ParameterError, VectorError
from torchlinop.parameters import ParameterLayout, ParamFilter, Slot
from torchlinop.piece import Piece


@dataclass(frozen=True)
class LocalSlot:
    """One parameter's place in the flat vector of this rank: entries ``start`` to ``stop``."""

    slot: Slot  # of the whole tensor, in the global vector
    piece: Piece
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.piece.numel


@dataclass(frozen=True)
class ShardedLayout:
    """The selected parameters of a model, of which every rank holds pieces.

    The global vector has the parameters in the order of ``named_parameters``, tied ones once, each
    row-major: as the same model has on one process. The local vector has first the pieces that
    this rank owns, then those that a lower rank holds as well.
    """

    layout: ParameterLayout  # of the whole model
    locals: tuple[LocalSlot, ...]  # in the order of the local vector
    owned: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        param_filter: ParamFilter | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> ShardedLayout:
        """Select as ``ParameterLayout.of`` does; two exchanges of short messages.

        Plain tensors are taken as held, equal, by all ranks.

        Raises:
            NoParametersError: nothing is selected.
            ParameterError: a parameter is complex or has no data, is sharded in a way that is not
                known here, or its shards on the ranks of the group do not make up a whole.
        """
        with agreed(group):
            layout = ParameterLayout.of(model, param_filter, sharded=True)
            parameters = dict(model.named_parameters(remove_duplicate=False))
            pieces = [piece_of(s.name, parameters[s.name].data, s.offset) for s in layout.slots]
        everywhere = gathered(pieces, group)
        _refuse_incomplete(layout, everywhere)
        before = {piece for theirs in everywhere[: dist.get_rank(group)] for piece in theirs}
        mine = zip(layout.slots, pieces, strict=True)
        ordered = sorted(mine, key=lambda own: own[1] in before)
        start, placed = 0, []
        for slot, piece in ordered:
            placed.append(LocalSlot(slot, piece, start))
            start += piece.numel
        owned = sum(piece.numel for piece in pieces if piece not in before)
        return cls(layout, tuple(placed), owned, group)

    @property
    def size(self) -> int:
        """n, entries of the global vector."""
        return self.layout.size

    @property
    def local_size(self) -> int:
        """Entries of the vector of this rank."""
        return self.locals[-1].stop

    @property
    def names(self) -> tuple[str, ...]:
        """One name a slot, in the order of ``named_parameters``."""
        return self.layout.names

    def space(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> ShardedSpace:
        """Vectors in these pieces; in the dtype and on the device of the parameters by default."""
        return ShardedSpace(
            self.size,
            dtype or self.layout.dtype,
            torch.device(device or self.layout.slots[0].device),
            tuple(local.piece for local in self.locals),
            self.owned,
            self.group,
        )

    def split(self, theta: Tensor) -> dict[str, Tensor]:
        """A local vector as local tensors: shape, dtype and device of each parameter's shard.

        Differentiable. Views where dtype and device allow it; aliases share one tensor.
        """
        self._refuse(theta)
        parts = theta.split([local.piece.numel for local in self.locals])
        named = {}
        for local, part in zip(self.locals, parts, strict=True):
            slot = local.slot
            tensor = part.view(local.piece.local_shape).to(dtype=slot.dtype, device=slot.device)
            named.update(dict.fromkeys(slot.names, tensor))
        return {name: named[name] for slot in self.layout.slots for name in slot.names}

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """A local vector or block (local_size, k), an eigenvector say, as views by name.

        Shapes are those of the shards, with k behind for a block.
        """
        self._refuse(v)
        return {
            s.slot.name: v[s.start : s.stop].view(s.piece.local_shape + v.shape[1:])
            for s in self.locals
        }

    def flatten(self, named: Mapping[str, Tensor]) -> Tensor:
        """Local tensors, or DTensors sharded as the parameters, as a new local vector or block."""
        columns = []
        for local in self.locals:
            name, shape = local.slot.name, local.piece.local_shape
            if name not in named:
                raise VectorError(
                    f"expected a tensor for every slot, but {name!r} is missing; "
                    f"pass all of: {', '.join(self.names)}"
                )
            tensor = named[name].detach()
            tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if tuple(tensor.shape[: len(shape)]) != shape:
                raise VectorError(
                    f"expected the shard {shape} of {name!r}, got {tuple(tensor.shape)}; pass "
                    "tensors sharded as the parameters"
                )
            tensor = tensor.reshape(local.piece.numel, *tensor.shape[len(shape) :])
            columns.append(tensor.to(dtype=self.layout.dtype, device=self.layout.slots[0].device))
        return torch.cat(columns)

    def gather(self, local: Tensor) -> Tensor:
        """The whole vector (n,) or block (n, k), on every rank: one all-reduce of its size."""
        return self.space(local.dtype, local.device).gather(local)

    def scatter(self, whole: Tensor) -> Tensor:
        """The rows of a vector (n,) or block (n, k) that this rank holds: no communication."""
        return self.space(whole.dtype, whole.device).scatter(whole)

    def _refuse(self, v: Tensor) -> None:
        if v.shape[:1] != (self.local_size,):
            raise VectorError(
                f"expected a vector of shape ({self.local_size},) or a block "
                f"({self.local_size}, k), which is what this rank holds of {self.size:,} entries, "
                f"got {tuple(v.shape)}; pass one of this operator"
            )


def _refuse_incomplete(layout: ParameterLayout, everywhere: list[list[Piece]]) -> None:
    """The pieces of every tensor, each counted once, must be as many entries as it has."""
    tensors = [[(piece.offset, piece.shape) for piece in pieces] for pieces in everywhere]
    if any(theirs != tensors[0] for theirs in tensors):
        raise ParameterError(
            "the ranks of this group have models of different parameters; build the same model, "
            "with the same param_filter, on every rank"
        )
    for slot, pieces in zip(layout.slots, zip(*everywhere, strict=True), strict=True):
        held = sum(piece.numel for piece in set(pieces))
        if held != slot.numel:
            raise ParameterError(
                f"the {len(everywhere)} ranks of this group hold {held:,} different entries of "
                f"parameter {slot.name!r}, which has {slot.numel:,}; pass the process group of "
                "all ranks that the model is sharded over"
            )
