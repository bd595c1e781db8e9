"""Where vectors live: their number of entries, dtype and device, and the inner product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from torchlinop.errors import OptionError

Distribution = Literal["gaussian", "rademacher", "sphere"]

# Entries that a CPU sums in single precision; what they add up to is summed in double. Its kernels
# go through vectors in a few accumulators: 10⁶ squares in one go are off by up to 4e-4, in pieces
# by 2e-7, in up to a third more time. GPUs sum in trees, which are as good as pieces.
_PIECE = 4096
_LONG_PIECE = 16384  # where every piece is a call of its own
_FEW = 4  # columns, up to which one batched call for all pieces is faster


@dataclass(frozen=True)
class VectorSpace:
    """Real or complex vectors of ``size`` entries, held by one process on one device."""

    size: int
    dtype: torch.dtype
    device: torch.device

    def inner(self, X: Tensor, Y: Tensor) -> Tensor:
        """``Xᴴ Y`` of blocks (n, k) and (n, m): a (k, m) tensor, in double precision.

        The only method that a sharded space lets communicate, with ``norm``.
        """
        X, Y = _single(X), _single(Y)
        wide = torch.promote_types(X.dtype, torch.float64)
        if not _piecewise(X):
            return torch.matmul(X.mH, Y).to(wide)
        if Y.shape[1] == 1 and X.shape[1] > _FEW:
            pieces = zip(X.split(_LONG_PIECE), Y.split(_LONG_PIECE), strict=True)
            sums = torch.stack([torch.matmul(x.mH, y) for x, y in pieces])
            return sums.sum(0, dtype=wide)
        parts = zip(_pieces(X), _pieces(Y), strict=True)
        return torch.cat([torch.matmul(x.mH, y) for x, y in parts]).sum(0, dtype=wide)

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
        drawn. ``"gaussian"`` has standard normal entries, ``"rademacher"`` has ±1, ``"sphere"``
        is uniform on the sphere of radius √n.
        """
        return torch.stack([self._column(seed, i, distribution) for i in range(columns)], dim=1)

    def _column(self, seed: int, index: int, distribution: Distribution) -> Tensor:
        stream = np.random.SeedSequence(seed, spawn_key=(index,)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(stream[0]) >> 1)
        v = _DISTRIBUTIONS[_checked(distribution)](self.size, generator)
        return v.to(dtype=self.dtype, device=self.device)


def _gaussian(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, generator=generator, dtype=torch.float64)


def _rademacher(n: int, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, (n,), generator=generator)
    return signs.double().mul_(2).sub_(1)


def _sphere(n: int, generator: torch.Generator) -> Tensor:
    v = _gaussian(n, generator)
    return v.mul_(n**0.5 / torch.linalg.vector_norm(v))


_DISTRIBUTIONS = {"gaussian": _gaussian, "rademacher": _rademacher, "sphere": _sphere}


def _checked(distribution: str) -> str:
    if distribution not in _DISTRIBUTIONS:
        raise OptionError(
            f"unknown distribution {distribution!r}; choose one of {', '.join(_DISTRIBUTIONS)}"
        )
    return distribution


def _single(X: Tensor) -> Tensor:
    """In float32 at least: float16 ends at 65504, and half precision has two or three digits."""
    return X.to(torch.promote_types(X.dtype, torch.float32))


def _piecewise(X: Tensor) -> bool:
    return len(X) > _PIECE and torch.finfo(X.dtype).bits == 32 and X.device.type == "cpu"


def _pieces(X: Tensor) -> tuple[Tensor, Tensor]:
    """Whole pieces (n // p, p, ...) and the rest (1, n % p, ...)."""
    whole = len(X) - len(X) % _PIECE
    return X[:whole].unflatten(0, (-1, _PIECE)), X[whole:][None]
