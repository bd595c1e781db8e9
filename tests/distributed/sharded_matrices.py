"""A known symmetric matrix on shards: some entries on every rank, the others split unevenly."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from torchlinop.distributed.sharded_space import ShardedSpace
from torchlinop.operators.base import CurvatureOperator
from torchlinop.piece import Piece
from torchlinop.testing.gallery import with_spectrum

N, REPLICATED = 60, 7


def uneven(n: int = N, replicated: int = REPLICATED, dtype: torch.dtype = torch.float64):
    """The first entries on all ranks, then 1, 2, 3, ... parts of the others; the last has none."""
    rank, world = dist.get_rank(), dist.get_world_size()
    parts = [r + 1 for r in range(world)]
    if world > 2:
        parts[-1] = 0
    cuts = [replicated + (n - replicated) * sum(parts[:r]) // sum(parts) for r in range(world + 1)]
    everywhere = Piece(0, (n,), (((0, replicated),),))
    own = Piece(0, (n,), (((cuts[rank], cuts[rank + 1]),),))
    pieces, owned = (own, everywhere), own.numel
    if rank == 0:
        pieces, owned = (everywhere, own), own.numel + replicated
    return ShardedSpace(n, dtype, torch.device("cpu"), pieces, owned)


class ShardedMatrix(CurvatureOperator):
    """A, of which a rank keeps its rows: a product gathers the vectors."""

    def __init__(self, A: Tensor, space: ShardedSpace, **options) -> None:
        super().__init__(space, **options)
        self.rows = space.scatter(A.to(space.dtype))
        self.products = 0

    def _matmat(self, V: Tensor) -> Tensor:
        self.products += V.shape[1]
        return self.rows @ self.space.gather(V)


def spectrum(n: int = N) -> Tensor:
    """Both signs, a few large ones, no multiple ones."""
    small = torch.linspace(-1, 1, n - 6, dtype=torch.float64)
    return torch.cat([small, torch.tensor([-9.0, 5.0, 12.0, 20.0, 33.0, 50.0]).double()])


def matrix(n: int = N) -> Tensor:
    """The matrix with this spectrum."""
    return with_spectrum(spectrum(n), seed=1)[0]


def positive(n: int = N) -> Tensor:
    """Its square, and a bit."""
    A = matrix(n)
    return A @ A + 0.1 * torch.eye(n, dtype=A.dtype)
