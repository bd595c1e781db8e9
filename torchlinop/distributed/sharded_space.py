"""Vectors in pieces on the ranks of a process group, and their inner products."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from torchlinop.distributed.agreement import divergence
from torchlinop.distributed.interruption import current, interrupted_together, with_flag
from torchlinop.errors import VectorError
from torchlinop.fingerprint import fingerprint
from torchlinop.piece import Piece
from torchlinop.random_column import CHUNK, RandomColumn
from torchlinop.run_store import RunStore
from torchlinop.space import VectorSpace


@dataclass(frozen=True)
class ShardedSpace(VectorSpace):
    """Vectors of ``size`` entries, of which each rank holds the pieces that it says here.

    A block on a rank is ``(local_size, k)``: its pieces one after the other. Several ranks may
    hold an entry; the first ``owned`` rows are those that this rank counts in a sum, and every
    entry is owned by one rank. Small results are on all ranks, the same bit by bit: an inner
    product of blocks, or the norms of a block, are one all-reduce of the result.
    """

    pieces: tuple[Piece, ...] = ()
    owned: int = 0
    group: dist.ProcessGroup | None = field(default=None, repr=False)

    @property
    def local_size(self) -> int:
        return sum(piece.numel for piece in self.pieces)

    @property
    def whole(self) -> bool:
        return False

    def share_of_inner(self, X: Tensor, Y: Tensor) -> Tensor:
        return super().inner(X[: self.owned], Y[: self.owned])

    def inner(self, X: Tensor, Y: Tensor) -> Tensor:
        return self.summed(self.share_of_inner(X, Y))

    def norm(self, v: Tensor) -> Tensor:
        return self.summed(super().norm(v[: self.owned]).square()).sqrt()

    def summed(self, small: Tensor) -> Tensor:
        run = current()
        if run is None:
            return self._reduced(small, dist.ReduceOp.SUM)
        numbers = torch.view_as_real(small) if small.is_complex() else small
        message = self._reduced(with_flag(numbers, run.asked), dist.ReduceOp.SUM)
        run.settle(message[-1:])
        total = message[:-1].view(numbers.shape)
        return torch.view_as_complex(total) if small.is_complex() else total

    def interruptible(self) -> AbstractContextManager[None]:
        return interrupted_together()

    def agree(self, flag: bool) -> bool:
        return self.least(-float(flag)) < 0

    def least(self, number: float) -> float:
        said = torch.tensor(number, dtype=torch.float64, device=self.device)
        return float(self._reduced(said, dist.ReduceOp.MIN))

    def largest_entry(self, X: Tensor) -> Tensor:
        largest = super().largest_entry(X) if X.numel() else X.new_zeros(()).abs()
        # A maximum may lose NaN; infinity is as good a sign of it.
        return self._reduced(largest.nan_to_num(math.inf, math.inf), dist.ReduceOp.MAX)

    def _reduced(self, small: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        # On the device of the vectors, as the group may know no other.
        total = small.to(self.device, copy=True).contiguous()
        dist.all_reduce(torch.view_as_real(total) if total.is_complex() else total, how, self.group)
        return total.to(small.device)

    def _fill(self, v: Tensor, entries: RandomColumn) -> Tensor:
        for start, indices in self.indices():
            v[start : start + len(indices)] = entries.at(indices)
        return v

    def indices(self) -> Iterator[tuple[int, Tensor]]:
        """Local rows from ``start`` on, and where they are in the global vector: part by part."""
        offset = 0
        for piece in self.pieces:
            for start in range(0, piece.numel, CHUNK):
                yield offset + start, piece.indices(start, min(start + CHUNK, piece.numel))
            offset += piece.numel

    def scatter(self, whole: Tensor) -> Tensor:
        """The rows of a vector (n,) or block (n, k) that this rank holds: no communication."""
        self._refuse(whole, self.size)
        local = whole.new_empty(self.local_size, *whole.shape[1:])
        for start, indices in self.indices():
            local[start : start + len(indices)] = whole[indices.to(whole.device)]
        return local

    def own_rows(self, whole: Tensor) -> Tensor:
        """The same, where every rank has to pass the same: one all-reduce of two numbers more."""
        number = (fingerprint(whole) & 0xFFFFFFFF).double()
        least, most = self._reduced(torch.stack([number, -number]), dist.ReduceOp.MIN).tolist()
        if least != -most:
            raise divergence()
        return self.scatter(whole)

    def gather(self, local: Tensor) -> Tensor:
        """The whole vector (n,) or block (n, k), on every rank: one all-reduce of its size."""
        self._refuse(local, self.local_size)
        whole = local.new_zeros(self.size, *local.shape[1:])
        for start, indices in self.indices():
            part = local[: self.owned][start : start + len(indices)]
            whole[indices[: len(part)].to(local.device)] = part
        return self._reduced(whole, dist.ReduceOp.SUM)

    def store(self, path: str | Path) -> RunStore:
        from torchlinop.run_folder import CheckpointFolder  # noqa: PLC0415  # slow

        return CheckpointFolder(Path(path), self, self.pieces, self.owned, self.group, alone=False)

    def _refuse(self, v: Tensor, rows: int) -> None:
        if len(v) != rows:
            raise VectorError(
                f"expected {rows:,} rows (this rank holds {self.local_size:,} of {self.size:,}), "
                f"got {tuple(v.shape)}; pass a vector or a block with as many"
            )
