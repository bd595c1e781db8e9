"""A = Σ_r A_r: matrices of the data of all ranks, where every rank has the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor

from torchlinop.articles import kind_of
from torchlinop.distributed.agreement import agreed, divergence, gathered, raise_together
from torchlinop.distributed.agreement import process_group as checked_group
from torchlinop.distributed.ballot import Ballot
from torchlinop.distributed.interruption import current, interrupted_together
from torchlinop.errors import OptionError
from torchlinop.fingerprint import fingerprint
from torchlinop.objective import Objective
from torchlinop.operators.base import CurvatureOperator
from torchlinop.operators.kfac import KFACOperator
from torchlinop.operators.of_objective import ObjectiveOperator
from torchlinop.space import VectorSpace
from torchlinop.union import united

T = TypeVar("T")
AnyOperator = TypeVar("AnyOperator", bound=ObjectiveOperator)
Made = TypeVar("Made", bound=CurvatureOperator)
AnyObjective = TypeVar("AnyObjective", bound=Objective)


@dataclass(frozen=True)
class GroupRanks:
    """The ranks of a process group, each with data of its own."""

    group: dist.ProcessGroup

    @property
    def name(self) -> str:
        number = dist.get_world_size(self.group)
        return f"on {number} rank{'' if number == 1 else 's'}"

    @property
    def number(self) -> int:
        return dist.get_rank(self.group)

    def agreed(self) -> AbstractContextManager[None]:
        return agreed(self.group)

    def gathered(self, mine: T) -> list[T]:
        return gathered(mine, self.group)

    def space(self, space: VectorSpace, *, sums: bool) -> VectorSpace:
        return ReplicatedSpace(space.size, space.dtype, space.device, self.group, sums)

    def sum(self, compute: Callable[[], Tensor], given: Tensor) -> Tensor:
        """``Σ_r compute()`` by one all-reduce, of some numbers more than ``given`` has (34).

        These tell whether any rank has failed or was interrupted, and whether ``given`` is the same
        on all.

        Raises:
            DivergenceError: it is not; else what a rank raised, on all ranks.
        """
        error: BaseException | None = None
        run = current()
        ballot = Ballot(self.number, dist.get_world_size(self.group), given.dtype)
        message = given.new_zeros(given.numel() + 2 + ballot.size)
        total, failed, interrupted, votes = message.split([given.numel(), 1, 1, ballot.size])
        try:
            total.copy_(compute().reshape(-1))
        except BaseException as raised:
            error = raised
            failed.fill_(1)
        interrupted.fill_(run is not None and run.asked)
        ballot.vote(fingerprint(given), votes)
        dist.all_reduce(message, group=self.group)
        # One look at all of it: the host has to wait for the device, once a product.
        failures, interruptions, *sums = message[given.numel() :].tolist()
        if not ballot.unanimous(sums):
            error = divergence()
        if error is not None or failures:
            raise_together(error, self.group)
        if run is not None and interruptions:
            run.stop()
        summed: Tensor = total.view(given.shape)
        return summed


def ranks_of(process_group: dist.ProcessGroup | None = None) -> GroupRanks:
    """The ranks of this group, or of all processes.

    Raises:
        ProcessGroupError: there is none.
    """
    return GroupRanks(checked_group(process_group))


@dataclass(frozen=True, eq=False)
class ReplicatedSpace(VectorSpace):
    """Vectors that all ranks of a group hold, the same on each.

    Equal to the space of a single process: matrices of both can be added.
    """

    group: dist.ProcessGroup | None = field(default=None, repr=False)
    sums: bool = True  # whether products of the matrix are sums over the ranks

    def interruptible(self) -> AbstractContextManager[None]:
        return interrupted_together() if self.sums else nullcontext()

    def agree(self, flag: bool) -> bool:
        return self.least(-float(flag)) < 0

    def least(self, number: float) -> float:
        said = torch.tensor(number, dtype=torch.float64, device=self.device)
        dist.all_reduce(said, dist.ReduceOp.MIN, self.group)
        return float(said)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, VectorSpace) or type(other) not in (VectorSpace, ReplicatedSpace):
            return NotImplemented
        return (self.size, self.dtype, self.device) == (other.size, other.dtype, other.device)

    def __hash__(self) -> int:
        return hash((self.size, self.dtype, self.device))


@overload
def data_parallel(
    what: AnyOperator, process_group: dist.ProcessGroup | None = None
) -> AnyOperator: ...
@overload
def data_parallel(
    what: AnyObjective, process_group: dist.ProcessGroup | None = None
) -> AnyObjective: ...
@overload
def data_parallel(
    what: type[Made], process_group: dist.ProcessGroup | None = None
) -> Callable[..., Made]: ...
def data_parallel(what: Any, process_group: dist.ProcessGroup | None = None) -> Any:
    """The same matrix over the data of all ranks, from what each rank has built of its own.

    Every rank holds the whole model (wrapped in DistributedDataParallel or not) and other batches,
    and makes the same calls. The matrix is exactly that of a single process with all batches,
    however many each rank has: sums over batches and counts of loss terms cross ranks, no means.
    Draws ("mc") and dropout masks belong to the sample's, or batch's, number in the data of rank
    0, then rank 1, and so on.

    Args:
        what: an operator on the model and the data of this rank (Hessian, GGN, Fisher, empirical
            Fisher); an objective; or a class of operators, also ``KFACOperator`` and
            ``EKFACOperator``, for the constructor that takes the same arguments: K-FAC's factors
            are summed over ranks before they are multiplied.
        process_group: of the ranks; all processes unless given.

    A product costs one all-reduce of n numbers (n k for a block of k columns) and 34 more, whatever
    the number of batches; an objective's value, or gradient, another. K-FAC sums
    each of its factors when it is built, and nothing later.

    Raises (on all ranks alike, whatever rank is at fault):
        ProcessGroupError: there is no process group; the ranks have different models or parameters.
        WeightingError, EmptyDataError: see ``united``.
        DivergenceError: at a product, the ranks passed different vectors.
        OptionError: ``what`` is none of these.
    """
    ranks = ranks_of(process_group)
    if isinstance(what, type) and issubclass(what, KFACOperator):
        return partial(what, ranks=ranks)
    if isinstance(what, type) and issubclass(what, ObjectiveOperator):
        return partial(_built, what, ranks)
    if isinstance(what, Objective):
        return united(what, ranks)
    if isinstance(what, ObjectiveOperator):
        op = copy.copy(what)
        op.unite(ranks)
        return op
    given = what.__name__ if isinstance(what, type) else kind_of(what)
    raise OptionError(
        "expected an operator on a model and its data, its class, or an objective, got "
        f"{given}; make data_parallel of each part and combine these, or give "
        "data_parallel(KFACOperator) the arguments, for K-FAC"
    )


def _built(kind: type[AnyOperator], ranks: GroupRanks, *args: Any, **options: Any) -> AnyOperator:
    with ranks.agreed():
        op = kind(*args, **options)
    op.unite(ranks)
    return op
