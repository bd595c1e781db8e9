"""Errors that all ranks raise together: nobody waits for a rank that has given up."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from torchlinop.errors import DivergenceError, ProcessGroupError, RankError

T = TypeVar("T")


@contextmanager
def agreed(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """What any rank raises inside is raised by all ranks, with the same class and sentence.

    All ranks of the group enter and leave. Inside, a rank that might raise must not communicate:
    the others would wait for it. Costs one exchange of short messages.
    """
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
    raise_together(error, group)


def raise_together(error: BaseException | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise on all ranks what any rank has to raise; return if there is nothing.

    If all ranks come with one sentence, that is raised; else that of the lowest rank, which it
    names. An error of a class that cannot be made from a sentence becomes a RankError. The rank
    that was interrupted stays so: Ctrl-C is no RankError there.
    """
    reports = gathered(None if error is None else _Report.of(error), group)
    failed = [(rank, report) for rank, report in enumerate(reports) if report is not None]
    if not failed:
        return
    alike = set(reports) == {failed[0][1]}
    if error is not None and (alike or not isinstance(error, Exception)):
        raise error  # an interruption stays one where it was made
    rank, report = failed[0]
    others = len(failed) - 1
    more = f" ({others} other rank{'s' if others > 1 else ''} failed too)" if others else ""
    raise report.again(f"on rank {rank} of {len(reports)}: {report.sentence}{more}") from error


def gathered(mine: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """What every rank has, in the order of ranks: small things that can be pickled."""
    of_ranks: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(of_ranks, mine, group)
    return of_ranks


def process_group(group: dist.ProcessGroup | None = None) -> dist.ProcessGroup:
    """This group, or that of all processes.

    Raises:
        ProcessGroupError: there is none, or this process is not part of it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ProcessGroupError(
            "expected a process group, got none: torch.distributed is not initialised; call "
            "torch.distributed.init_process_group() in a script started by torchrun"
        )
    whole = dist.group.WORLD
    chosen = whole if group is None else group
    if chosen is None or dist.get_rank(chosen) < 0:
        raise ProcessGroupError(
            f"expected a process group with this process in it, which is rank {dist.get_rank()} "
            "of all; build the operator on the ranks of its group only"
        )
    return chosen


def divergence() -> DivergenceError:
    """Of ranks that do not have the same vectors where they should."""
    return DivergenceError(
        "the ranks passed different vectors to a product: the solver does not take the same steps "
        "everywhere. Give it the same start (v0) and seed on all ranks, or run it on rank 0 alone "
        "by torchlinop.distributed.drive(op, solver)"
    )


@dataclass(frozen=True)
class _Report:
    """An error, as others can be told of it."""

    module: str
    name: str
    sentence: str

    @classmethod
    def of(cls, error: BaseException) -> _Report:
        kind = type(error)
        return cls(kind.__module__, kind.__qualname__, str(error) or "no message")

    def again(self, sentence: str) -> BaseException:
        """An error of the same class."""
        kind = getattr(sys.modules.get(self.module), self.name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                error = kind(sentence)
            except Exception:
                error = None
            if error is not None and str(error) == sentence:
                return error
        return RankError(f"{sentence} ({self.name})")
