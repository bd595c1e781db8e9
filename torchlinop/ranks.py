"""The processes that have the data between them: one alone, unless told of others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from torchlinop.space import VectorSpace

T = TypeVar("T")


class Ranks(Protocol):
    """What processes that take the same steps, each with data of its own, say to each other.

    All of them call the same methods in the same order.
    """

    @property
    def name(self) -> str: ...  # for people; empty for one process
    @property
    def number(self) -> int: ...  # of this one, from 0
    def agreed(self) -> AbstractContextManager[None]: ...  # errors inside are raised by all
    def gathered(self, mine: T) -> list[T]: ...  # small things, in the order of the ranks

    def space(self, space: VectorSpace, *, sums: bool) -> VectorSpace:
        """Vectors that all of them hold, of a matrix whose products are, or are not, ``sum``s."""
        ...

    def sum(self, compute: Callable[[], Tensor], given: Tensor) -> Tensor:
        """``Σ_r compute()``, of the shape of ``given``, in one all-reduce.

        ``given`` is the same on all ranks. An error in ``compute`` is raised by all.
        """
        ...


@dataclass(frozen=True)
class OneProcess:
    """It has all data."""

    name: str = ""
    number: int = 0

    def agreed(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def gathered(self, mine: T) -> list[T]:
        return [mine]

    def space(self, space: VectorSpace, *, sums: bool) -> VectorSpace:
        return space

    def sum(self, compute: Callable[[], Tensor], given: Tensor) -> Tensor:
        return compute()


ALONE = OneProcess()
