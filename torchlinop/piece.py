"""The part of one tensor that a rank holds: in every dimension, some of the indices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Ranges = tuple[tuple[int, int], ...]  # (start, stop), ascending


@dataclass(frozen=True)
class Piece:
    """Entries of a tensor of this shape, which begins at ``offset`` in the global flat vector.

    ``held[d]`` says which indices in dimension d: the piece is their product, row-major, so that
    its entries are in the order of the global vector.
    """

    offset: int
    shape: tuple[int, ...]
    held: tuple[Ranges, ...]

    @classmethod
    def whole(cls, offset: int, shape: tuple[int, ...]) -> Piece:
        """All entries."""
        return cls(offset, tuple(shape), tuple(((0, m),) for m in shape))

    @classmethod
    def of_json(cls, written: Sequence[Any]) -> Piece:
        """Of its three fields, as lists."""
        offset, shape, held = written
        ranges = tuple(tuple((start, stop) for start, stop in of_dim) for of_dim in held)
        return cls(offset, tuple(shape), ranges)

    @property
    def local_shape(self) -> tuple[int, ...]:
        return tuple(sum(stop - start for start, stop in ranges) for ranges in self.held)

    @property
    def numel(self) -> int:
        return math.prod(self.local_shape)

    @property
    def span(self) -> tuple[int, int]:
        """The first and the last index of the tensor in the global vector."""
        return self.offset, self.offset + math.prod(self.shape) - 1

    def indices(self, start: int, stop: int) -> Tensor:
        """Where its entries ``start`` to ``stop`` are in the global vector, int64."""
        position = torch.arange(start, stop)
        total = torch.full_like(position, self.offset)
        stride = 1
        for m, ranges in zip(reversed(self.shape), reversed(self.held), strict=True):
            index = torch.cat([torch.arange(*r) for r in ranges])
            total += stride * index[position % len(index)]
            position //= len(index)
            stride *= m
        return total


def placed(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, int]]:
    """Pieces, and where they begin in a local vector."""
    place = 0
    for piece in pieces:
        yield piece, place
        place += piece.numel


def in_common(theirs: Piece, ours: Sequence[Piece]) -> Iterator[tuple[Tensor, Tensor]]:
    """Where entries of a piece are in it, and where in a local vector of these pieces."""
    first, last = theirs.span
    for piece, place in placed(ours):
        start, stop = piece.span
        if start > last or stop < first or not piece.numel or not theirs.numel:
            continue
        there, here = theirs.indices(0, theirs.numel), piece.indices(0, piece.numel)
        source = torch.searchsorted(there, here).clamp_(max=len(there) - 1)
        hits = (there[source] == here).nonzero()[:, 0]
        if len(hits):
            yield source[hits], place + hits
