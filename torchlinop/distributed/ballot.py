"""Whether all ranks have the same fingerprint: ±1 for each of its bits, in the sum of a product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlinop.fingerprint import signs

BITS = 32


@dataclass(frozen=True)
class Ballot:
    """Numbers of some dtype that ranks add up: exact, however few digits the dtype has.

    Sums of ±1 are exact up to 2/ε, which is 256 in bfloat16. So many ranks vote in one row of
    ``BITS`` numbers, the next ones in another.
    """

    rank: int
    ranks: int
    dtype: torch.dtype

    @property
    def of_a_row(self) -> int:
        return int(2 / torch.finfo(self.dtype).eps)

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return BITS * math.ceil(self.ranks / self.of_a_row)

    def vote(self, fingerprint: Tensor, numbers: Tensor) -> None:
        """Write that of this rank into ``numbers``, which are zeros: (size,)."""
        numbers.view(-1, BITS)[self.rank // self.of_a_row] = signs(fingerprint, BITS)

    def unanimous(self, sums: Sequence[float]) -> bool:
        """Whether all ranks had the same fingerprint, by the sums of their numbers."""
        return all(abs(sum(sums[bit::BITS])) == self.ranks for bit in range(BITS))
