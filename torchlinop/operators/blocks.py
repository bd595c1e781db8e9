"""Σ_b E_b A_b E_bᵀ: operators A_b on disjoint sets b of indices, and zero elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlinop.articles import kind_of
from torchlinop.errors import VectorError
from torchlinop.memory import free_bytes
from torchlinop.operators.base import CurvatureOperator
from torchlinop.operators.grouping import Grouping
from torchlinop.parameters import ParameterLayout
from torchlinop.space import VectorSpace

Rows = Tensor | slice  # distinct indices (m,), or a range of them
Block = tuple[Rows, CurvatureOperator]


class BlockDiagonalOperator(CurvatureOperator):
    """Operators on parts of a vector of ``size`` entries; rows in no block are zero.

    Args:
        size: n, of the whole.
        blocks: pairs of rows, a slice or a tensor of distinct indices, and the operator on these.
        layout: the names of parameters, if the vector has any.

    A product costs one of every block, each on its own rows.

    Raises:
        VectorError: blocks overlap, do not fit their rows, or differ in dtype or device; the layout
            has another size.

    Example:
        >>> from torchlinop import LambdaOperator
        >>> twice = LambdaOperator(2, lambda v: 2.0 * v)
        >>> BlockDiagonalOperator(4, [(slice(1, 3), twice)]) @ torch.ones(4)
        tensor([0., 2., 2., 0.])
    """

    def __init__(
        self, size: int, blocks: Sequence[Block], *, layout: ParameterLayout | None = None
    ) -> None:
        if not blocks:
            raise VectorError("expected at least one block, got none; pass [(rows, operator)]")
        first = blocks[0][1]
        space = VectorSpace(size, first.dtype, first.device)
        _refuse_misfits(space, blocks)
        rows = sum(operator.size for _, operator in blocks)
        facts = [f"{len(blocks)} blocks on {rows:,} of {size:,} rows"]
        super().__init__(
            space,
            layout=layout,
            description=facts,
            positive_semidefinite=all(A.positive_semidefinite for _, A in blocks),
        )
        self.parts = tuple((_stored(rows, space), operator) for rows, operator in blocks)
        self._products: Products = BlockByBlock(self.parts)

    @classmethod
    def of(cls, operator: CurvatureOperator, by: Grouping = "parameter") -> BlockDiagonalOperator:
        """The block diagonal part of an operator: the blocks of ``operator.blocks(by)`` alone.

        A product with k columns costs B k products of the operator, for B blocks, taken in one
        pass as columns side by side, or in as few as memory allows.
        """
        blocks = [(block.indices, block) for block in operator.blocks(by).values()]
        part = cls(operator.size, blocks, layout=operator.layout)
        part._products = SideBySide(operator, tuple(rows for rows, _ in blocks))
        return part

    def _matmat(self, V: Tensor) -> Tensor:
        AV = torch.zeros_like(V)
        for rows, product in self._products(V):
            AV[rows] = product
        return AV


# V (n, k) -> the rows b and A_b V[b], for every block b
Products = Callable[[Tensor], Iterator[tuple[Rows, Tensor]]]


@dataclass(frozen=True)
class BlockByBlock:
    """Every block multiplies its own rows."""

    blocks: tuple[Block, ...]

    def __call__(self, V: Tensor) -> Iterator[tuple[Rows, Tensor]]:
        for rows, operator in self.blocks:
            yield rows, operator.matmat(V[rows])


@dataclass(frozen=True)
class SideBySide:
    """``(A P_b V)[b]`` for all blocks b of one operator: the columns of all P_b V in one product.

    P_b sets to zero what is outside of b.
    """

    operator: CurvatureOperator
    rows: tuple[Tensor, ...]

    def __call__(self, V: Tensor) -> Iterator[tuple[Rows, Tensor]]:
        n, k = V.shape
        at_once = max(1, columns_that_fit(self.operator.space) // k)
        for start in range(0, len(self.rows), at_once):
            some = self.rows[start : start + at_once]
            PV = V.new_zeros(n, len(some), k)
            for i, rows in enumerate(some):
                PV[rows, i] = V[rows]
            APV = self.operator.matmat(PV.flatten(1)).unflatten(1, (len(some), k))
            for i, rows in enumerate(some):
                yield rows, APV[rows, i]


def columns_that_fit(space: VectorSpace) -> int:
    """How many columns to multiply at once, so that half of the free memory stays free."""
    # A block, its product, and the two buffers of an operator that takes them in chunks.
    a_column = 4 * space.size * space.dtype.itemsize
    return max(1, free_bytes(space.device) // 2 // a_column)


def _refuse_misfits(space: VectorSpace, blocks: Sequence[Block]) -> None:
    covered = torch.zeros(space.size, dtype=torch.bool)
    for b, (where, operator) in enumerate(blocks):
        rows = _indices(where, space.size, b)
        if (operator.dtype, operator.device) != (space.dtype, space.device):
            raise VectorError(
                f"expected blocks of {space.dtype} on {space.device}, got {operator.dtype} on "
                f"{operator.device} in block {b}; build all blocks alike"
            )
        if len(rows) != operator.size:
            raise VectorError(
                f"expected {operator.size} rows for block {b}, {operator!r}, got {len(rows)} of "
                f"{space.size}; pass as many as the operator has"
            )
        if covered[rows].any() or len(rows.unique()) != len(rows):
            raise VectorError(
                f"expected blocks that share no row, but block {b} has a row twice, or one of an "
                "earlier block; add operators that overlap, with +"
            )
        covered[rows] = True


def _stored(rows: Rows, space: VectorSpace) -> Rows:
    """Ranges stay ranges, of which vectors have views."""
    if isinstance(rows, slice):
        start, stop, step = rows.indices(space.size)
        return rows if step == 1 else torch.arange(start, stop, step, device=space.device)
    return rows.to(space.device)


def _indices(where: Rows, size: int, b: int) -> Tensor:
    """The rows as a tensor of indices."""
    if isinstance(where, slice):
        return torch.arange(*where.indices(size))
    if not isinstance(where, Tensor):
        raise VectorError(
            f"expected a slice or a tensor of indices for block {b}, got "
            f"{kind_of(where)}; pass torch.tensor(rows)"
        )
    indices = where.dtype == torch.int64 and where.ndim == 1
    if not indices or not ((where >= 0) & (where < size)).all():
        raise VectorError(
            f"expected int64 indices (m,) from 0 to {size - 1} for block {b}, got {where.dtype} of "
            f"shape {tuple(where.shape)}; pass mask.nonzero()[:, 0] for a mask"
        )
    return where.cpu()
