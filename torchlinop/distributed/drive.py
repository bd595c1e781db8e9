"""One solver on rank 0, the products of its matrix on all ranks: SciPy and CuPy over a cluster."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from torchlinop.distributed.agreement import process_group as checked_group
from torchlinop.distributed.agreement import raise_together
from torchlinop.distributed.interruption import interrupted_together
from torchlinop.errors import OptionError
from torchlinop.operators.base import CurvatureOperator
from torchlinop.space import VectorSpace

T = TypeVar("T")

_RELEASE = 0  # instead of a number of columns


def drive(
    op: CurvatureOperator,
    function: Callable[[CurvatureOperator], T],
    process_group: dist.ProcessGroup | None = None,
) -> T:
    """``function(A)`` on rank 0, where A is the matrix of ``op``; its result, on all ranks.

    All ranks call this, with their part of the same operator: data-parallel or sharded. On rank 0,
    A takes and returns whole vectors, as solvers of other libraries do; each product sends them to
    the others, which serve products until ``function`` returns. So only rank 0 needs to hold what
    the solver stores.

    A product costs two broadcasts, of a number and of the vectors (n k numbers), besides those of
    ``op``; the end, an exchange of messages and a broadcast of the result.

    Args:
        op: this rank's part.
        function: any solver; it may be another on other ranks, where it is not called.
        process_group: all processes unless given; that of ``op``.

    Raises:
        ProcessGroupError: there is no process group. What ``function`` raises on rank 0, and what a
            product raises on any rank and ``function`` lets through: on all ranks. Ctrl-C on any
            rank waits for the end of a product.

    Example: ``drive(op, lambda A: eigsh(as_linear_operator(A), k=3))``, of SciPy.
    """
    group = checked_group(process_group)
    served = _Served(op, group)
    error: BaseException | None = None
    result, sent = None, [b""]
    try:
        if dist.get_rank(group) == 0:
            with served.until_done():
                result = function(served)
                sent = [_pickled(result)]
        else:
            with interrupted_together():
                served.serve()
    except BaseException as raised:
        error = raised
    raise_together(error, group)
    dist.broadcast_object_list(sent, dist.get_global_rank(group, 0), group)
    return cast(T, result if dist.get_rank(group) == 0 else pickle.loads(sent[0]))


def _pickled(result: object) -> bytes:
    try:
        return pickle.dumps(result)
    except Exception as error:
        raise OptionError(
            "expected function to return what can be sent to the other ranks, got a "
            f"{type(result).__name__} ({error}); return arrays and numbers"
        ) from error


class _Served(CurvatureOperator):
    """The whole matrix on rank 0; every product is taken by all ranks."""

    def __init__(self, op: CurvatureOperator, group: dist.ProcessGroup) -> None:
        space = VectorSpace(op.size, op.dtype, op.device)
        super().__init__(
            space,
            layout=op.layout,
            description=[*op.description, f"driven from rank 0 of {dist.get_world_size(group)}"],
            notes=op.notes,
            positive_semidefinite=op.positive_semidefinite,
        )
        self._op = op
        self._group = group
        self._first = dist.get_global_rank(group, 0)
        self._failed = False  # the last product, here

    def _matmat(self, V: Tensor) -> Tensor:
        self._tell(V.shape[1])
        self._failed = True
        AV = self._multiply(V.contiguous())
        self._failed = False
        return AV

    def _multiply(self, V: Tensor) -> Tensor:
        with interrupted_together():  # not between collectives
            dist.broadcast(V, self._first, self._group)
            return self._op.space.gather(self._op.matmat(self._op.space.scatter(V)))

    @contextmanager
    def until_done(self) -> Iterator[None]:
        """Release the other ranks at the end, whatever happens."""
        raised = True
        try:
            yield
            raised = False
        finally:
            self._tell(_RELEASE, raised)

    def serve(self) -> None:
        """Take part in products until released.

        What a product raises is raised at the end, unless rank 0 saw it and went on.
        """
        error: BaseException | None = None
        while True:
            columns, failed, raised = self._told(torch.zeros(3, dtype=torch.int64))
            if failed and not raised:
                error = None
            if columns == _RELEASE:
                break
            V = torch.empty(self.size, columns, dtype=self.dtype, device=self.device)
            try:
                self._multiply(V)
            except (Exception, KeyboardInterrupt) as of_product:
                error = error or of_product
        if error is not None:
            raise error

    def _tell(self, columns: int, raised: bool = False) -> None:
        """How many columns come next; whether the last product failed here, and the function."""
        self._told(torch.tensor([columns, self._failed, raised], dtype=torch.int64))

    def _told(self, message: Tensor) -> list[int]:
        message = message.to(self.device)
        dist.broadcast(message, self._first, self._group)
        numbers: list[int] = message.tolist()
        return numbers
