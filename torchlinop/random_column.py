"""One random column of a block, drawn in chunks, so that any part of it is had by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

CHUNK = 2**16

Draw = Callable[[int, torch.Generator], Tensor]


class RandomColumn:
    """Independent entries 0 to ``size`` - 1, in float64, fixed by (seed, column) alone.

    Entries come in chunks of 2¹⁶, each with a stream of its own: a part costs the chunks that it
    touches, and no part depends on how the rest is divided among processes.
    """

    def __init__(self, size: int, seed: int, column: int, draw: Draw) -> None:
        self.size, self.seed, self.column, self._draw = size, seed, column, draw
        self._last: tuple[int, Tensor] | None = None

    def chunks(self) -> Iterator[Tensor]:
        """All entries, in order."""
        for c in range(-(-self.size // CHUNK)):
            yield self._chunk(c)

    def at(self, indices: Tensor) -> Tensor:
        """The entries at these indices (m,), which ascend."""
        values = torch.empty(len(indices), dtype=torch.float64)
        if not len(indices):
            return values
        first, last = int(indices[0]) // CHUNK, int(indices[-1]) // CHUNK
        edges = torch.arange(first, last + 2) * CHUNK
        cuts = torch.searchsorted(indices, edges).tolist()
        for c, start, stop in zip(range(first, last + 1), cuts[:-1], cuts[1:], strict=True):
            if start < stop:
                values[start:stop] = self._chunk(c)[indices[start:stop] - c * CHUNK]
        return values

    def _chunk(self, c: int) -> Tensor:
        if self._last is None or self._last[0] != c:  # neighbouring parts share one
            key = (self.column, c) if c else (self.column,)
            stream = np.random.SeedSequence(self.seed, spawn_key=key).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(stream[0]) >> 1)
            self._last = c, self._draw(min(CHUNK, self.size - c * CHUNK), generator)
        return self._last[1]


def gaussian(n: int, generator: torch.Generator) -> Tensor:
    """Standard normal entries (n,)."""
    return torch.randn(n, generator=generator, dtype=torch.float64)


def rademacher(n: int, generator: torch.Generator) -> Tensor:
    """Entries ±1 (n,)."""
    signs = torch.randint(0, 2, (n,), generator=generator)
    return signs.double().mul_(2).sub_(1)
