"""Where vectors live: their number of entries, dtype and device, and the inner product."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from torchlinop.choices import refuse_unknown
from torchlinop.random_column import Draw, RandomColumn, gaussian, rademacher
from torchlinop.run_store import LATEST, FileStore, RunStore

Distribution = Literal["gaussian", "rademacher", "sphere"]

# Entries that a CPU sums in single precision; what they add up to is summed in double. Its kernels
# go through vectors in a few accumulators: 10⁶ squares in one go are off by up to 4e-4, in pieces
# by 2e-7, in up to a third more time. GPUs sum in trees, which are as good as pieces.
_PIECE = 4096
_LONG_PIECE = 16384  # where every piece is a call of its own
_FEW = 4  # columns, up to which one batched call for all pieces is faster
_MANY = 2**18  # entries, from which a call for every column is faster than all pairs in one


@dataclass(frozen=True)
class VectorSpace:
    """Real or complex vectors of ``size`` entries, held by one process on one device."""

    size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def local_size(self) -> int:
        """How many entries of a vector this process holds: rows of a block, in memory."""
        return self.size

    @property
    def whole(self) -> bool:
        """Whether this process holds all entries, in their order."""
        return True

    def summed(self, small: Tensor) -> Tensor:
        """What every process has of a sum over the rows that are its own, added up."""
        return small

    def agree(self, flag: bool) -> bool:
        """Whether any process says so. Clocks and memory differ, but all have to stop together."""
        return flag

    def interruptible(self) -> AbstractContextManager[None]:
        """Inside, Ctrl-C is raised by all processes in the same place."""
        return nullcontext()

    def least(self, number: float) -> float:
        """The least number that any process has."""
        return number

    def largest_entry(self, X: Tensor) -> Tensor:
        """``max |x_ij|`` (); NaN or infinite if an entry is."""
        largest: Tensor = torch.linalg.vector_norm(X, torch.inf)
        return largest

    def unit_vectors(self, start: int, stop: int) -> Tensor:
        """Columns ``start`` to ``stop`` of the identity (n, stop - start)."""
        E = torch.zeros(self.size, stop - start, dtype=self.dtype, device=self.device)
        E[start:stop].fill_diagonal_(1)
        return self.scatter(E)

    def scatter(self, whole: Tensor) -> Tensor:
        """The rows that this process holds of a whole vector (n,) or block (n, k)."""
        return whole

    def own_rows(self, whole: Tensor) -> Tensor:
        """The same, if all processes have the same vectors; else DivergenceError, on all."""
        return self.scatter(whole)

    def gather(self, local: Tensor) -> Tensor:
        """The whole vector (n,) or block (n, k), on every process."""
        return local

    def store(self, path: str | Path) -> RunStore:
        """Where a run keeps its state: a file; a folder, if one of several ranks is there."""
        if not (Path(path) / LATEST).exists():
            return FileStore(Path(path))
        # One process goes on from what several have done.
        from torchlinop.run_folder import whole_folder  # noqa: PLC0415  # slow

        return whole_folder(Path(path), self)

    def share_of_inner(self, X: Tensor, Y: Tensor) -> Tensor:
        """What this process adds to ``inner``; several of them are ``summed`` at once."""
        return self.inner(X, Y)

    def inner(self, X: Tensor, Y: Tensor) -> Tensor:
        """``Xᴴ Y`` of blocks (n, k) and (n, m): a (k, m) tensor, in double precision.

        On shards, this communicates, as all do that give the same small result to all ranks.
        """
        X, Y = _single(X), _single(Y)
        wide = torch.promote_types(X.dtype, torch.float64)
        if not _piecewise(X):
            return torch.matmul(X.mH, Y).to(wide)
        if Y.shape[1] == 1 and X.shape[1] > _FEW:
            pieces = zip(X.mH.split(_LONG_PIECE, 1), Y.split(_LONG_PIECE), strict=True)
            return torch.stack([torch.mm(x, y) for x, y in pieces]).sum(0, dtype=wide)
        parts = zip(_pieces(X), _pieces(Y), strict=True)
        return torch.cat([torch.matmul(x.mH, y) for x, y in parts]).sum(0, dtype=wide)

    def dots(self, X: Tensor, Y: Tensor) -> Tensor:
        """``⟨x_i, y_i⟩`` of every column of two blocks (n, k): (k,), in double precision."""
        few = self.size * X.shape[1] < _MANY  # a choice that is the same on all ranks
        if X.is_cuda or few:  # where all pairs take no longer
            return self.inner(X, Y).diagonal()
        columns = zip(X.split(1, 1), Y.split(1, 1), strict=True)
        return self.summed(torch.cat([self.share_of_inner(x, y) for x, y in columns]).flatten())

    def norm(self, v: Tensor) -> Tensor:
        """Euclidean norm of a vector (n,), or of every column of a block (n, k), in float64."""
        v = _single(v)
        parts = _pieces(v) if _piecewise(v) else (v[None],)
        lengths = torch.cat([torch.linalg.vector_norm(part, dim=1) for part in parts])
        norms: Tensor = torch.linalg.vector_norm(lengths, dim=0, dtype=torch.float64)
        return norms

    def random(
        self, columns: int, seed: int = 0, distribution: Distribution = "gaussian"
    ) -> Tensor:
        """A block (n, columns) of independent random columns.

        Column i depends on (seed, i) alone: not on the device, nor on how many columns are
        drawn, nor on how many processes hold the vectors. ``"gaussian"`` has standard normal
        entries, ``"rademacher"`` has ±1, ``"sphere"`` is uniform on the sphere of radius √n.
        """
        refuse_unknown("distribution", distribution, _DISTRIBUTIONS)
        draw, on_sphere = _DISTRIBUTIONS[distribution]
        drawn = [RandomColumn(self.size, seed, i, draw) for i in range(columns)]
        return torch.stack([self._column(entries, on_sphere) for entries in drawn], dim=1)

    def _column(self, entries: RandomColumn, on_sphere: bool) -> Tensor:
        if not on_sphere:
            v = torch.empty(self.local_size, dtype=self.dtype, device=self.device)
            return self._fill(v, entries)
        # Rounded once, after division by the length.
        v = self._fill(torch.empty(self.local_size, dtype=torch.float64), entries)
        v.mul_(self.size**0.5 / self.norm(v).to(v.device))
        return v.to(dtype=self.dtype, device=self.device)

    def _fill(self, v: Tensor, entries: RandomColumn) -> Tensor:
        """The entries that this process holds, in v (local_size,)."""
        start = 0
        for chunk in entries.chunks():
            v[start : start + len(chunk)] = chunk
            start += len(chunk)
        return v


# How to draw an entry, and whether the column is then scaled to length √n.
_DISTRIBUTIONS: dict[str, tuple[Draw, bool]] = {
    "gaussian": (gaussian, False),
    "rademacher": (rademacher, False),
    "sphere": (gaussian, True),
}


def _single(X: Tensor) -> Tensor:
    """In float32 at least: float16 ends at 65504, and half precision has two or three digits."""
    return X.to(torch.promote_types(X.dtype, torch.float32))


def _piecewise(X: Tensor) -> bool:
    return len(X) > _PIECE and torch.finfo(X.dtype).bits == 32 and X.device.type == "cpu"


def _pieces(X: Tensor) -> tuple[Tensor, Tensor]:
    """Whole pieces (n // p, p, ...) and the rest (1, n % p, ...)."""
    whole = len(X) - len(X) % _PIECE
    return X[:whole].unflatten(0, (-1, _PIECE)), X[whole:][None]
