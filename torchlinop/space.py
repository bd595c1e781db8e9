"""Where vectors live: their number of entries, dtype and device, and the inner product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from torchlinop.errors import OptionError

Distribution = Literal["gaussian", "rademacher", "sphere"]


@dataclass(frozen=True)
class VectorSpace:
    """Real or complex vectors of ``size`` entries, held by one process on one device."""

    size: int
    dtype: torch.dtype
    device: torch.device

    def inner(self, X: Tensor, Y: Tensor) -> Tensor:
        """``Xᴴ Y`` of blocks (n, k) and (n, m): a (k, m) tensor.

        The only method that a sharded space lets communicate.
        """
        return torch.matmul(X.mH, Y)

    def norm(self, v: Tensor) -> Tensor:
        """Euclidean norm of a vector (n,), or of every column of a block (n, k)."""
        norms: Tensor = torch.linalg.vector_norm(v, dim=0)
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
