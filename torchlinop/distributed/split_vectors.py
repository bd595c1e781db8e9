"""Vectors split over ranks that all have the matrix: a basis takes as much less memory."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from torchlinop.distributed.agreement import process_group as checked_group
from torchlinop.distributed.agreement import raise_together
from torchlinop.distributed.data_parallel import GroupRanks
from torchlinop.distributed.sharded_space import ShardedSpace
from torchlinop.errors import VectorError
from torchlinop.operators.base import CurvatureOperator
from torchlinop.operators.of_objective import ObjectiveOperator
from torchlinop.piece import Piece


def split_over(
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> ShardedSpace:
    """Vectors split evenly over the ranks of a group, in order: the last ranks may have less."""
    rows = -(-size // dist.get_world_size(group))
    start = min(size, rows * dist.get_rank(group))
    stop = min(size, start + rows)
    piece = Piece(0, (size,), (((start, stop),),))
    return ShardedSpace(size, dtype, device, (piece,), stop - start, group)


def over_replicas(
    op: CurvatureOperator, process_group: dist.ProcessGroup | None = None
) -> SplitOperator:
    """The same matrix on vectors that are split evenly over the ranks, which all have it.

    Of the vectors of a solver, each rank then keeps n / ranks entries, and the work on them is
    divided as well. A product gathers its block (n numbers a column) and, of a matrix that
    ``data_parallel`` made, adds up and scatters what the ranks have found (n more): as many bytes
    as the one all-reduce in its place. Any other matrix has to be the same on all ranks.

    Args:
        op: ``data_parallel(...)``, a combination of such, or an operator alike on all ranks.
        process_group: of the ranks; all processes unless given.

    Raises:
        ProcessGroupError: there is none. VectorError: the vectors of ``op`` are split already.
    """
    return SplitOperator(op, checked_group(process_group))


class SplitOperator(CurvatureOperator):
    """A on split vectors: V is gathered, and of A V each rank keeps its rows."""

    def __init__(self, operator: CurvatureOperator, group: dist.ProcessGroup) -> None:
        if not operator.space.whole:
            raise VectorError(
                f"expected an operator whose vectors are whole on every rank, got {operator!r}; "
                "its vectors are split already: pass it to the solver as it is"
            )
        ranks = dist.get_world_size(group)
        super().__init__(
            split_over(operator.size, operator.dtype, operator.device, group),
            layout=operator.layout,
            description=[f"vectors split over {ranks} ranks, of {operator!r}"],
            notes=operator.notes,
            positive_semidefinite=operator.positive_semidefinite,
        )
        self.operator = _scattering(operator, group)
        self._rank, self._group = dist.get_rank(group), group
        self._rows = -(-operator.size // ranks)  # but of the last ranks

    def _matmat(self, V: Tensor) -> Tensor:
        ranks = dist.get_world_size(self._group)
        padded = V.new_zeros(self._rows, V.shape[1])
        padded[: len(V)] = V
        whole = V.new_empty(ranks * self._rows, V.shape[1])
        dist.all_gather_into_tensor(whole, padded, self._group)
        AV = self.operator.matmat(whole[: self.size])
        start = min(self.size, self._rank * self._rows)
        return AV[start : start + len(V)].clone()


@dataclass(frozen=True)
class _ScatteringRanks(GroupRanks):
    """Of a sum of blocks, a rank gets its own rows; the others are zero, and nobody's to read."""

    def sum(self, compute: Callable[[], Tensor], given: Tensor) -> Tensor:
        """``Σ_r compute()`` in the rows of this rank, by one reduce-scatter and one small sum.

        NaN everywhere if any rank has found NaN or infinity, so that all ranks see it.

        Raises:
            What a rank raised, on all ranks.
        """
        if given.ndim != 2:
            return super().sum(compute, given)
        ranks = dist.get_world_size(self.group)
        rows = -(-len(given) // ranks)
        message = given.new_zeros(ranks * rows, given.shape[1])
        error: BaseException | None = None
        try:
            message[: len(given)] = compute()
        except BaseException as raised:
            error = raised
        flags = torch.stack(
            [
                torch.tensor(error is not None, device=given.device),
                ~torch.isfinite(message).all(),
            ]
        ).double()
        dist.all_reduce(flags, group=self.group)
        failed, not_finite = (flags > 0).tolist()
        if failed:
            raise_together(error, self.group)
        own = given.new_empty(rows, given.shape[1])
        dist.reduce_scatter_tensor(own, message, group=self.group)
        total = message.zero_() if not not_finite else message.fill_(torch.nan)
        start = rows * self.number
        if not not_finite:
            total[start : start + rows] = own
        return total[: len(given)]


def _scattering(operator: CurvatureOperator, group: dist.ProcessGroup) -> CurvatureOperator:
    """The operator whose products, if summed over these ranks, have this rank's rows alone."""
    if not isinstance(operator, ObjectiveOperator):
        return operator
    ranks = operator.objective.ranks
    if not isinstance(ranks, GroupRanks) or ranks.group != group:
        return operator
    scattering = copy.copy(operator)
    scattering.objective = dataclasses.replace(operator.objective, ranks=_ScatteringRanks(group))
    return scattering
