"""The processes that share one folder: what they write and read there, and agree to be wrong."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from torchlinop.errors import OptionError

T = TypeVar("T")

_FAILURES = (OSError, ValueError, TypeError, LookupError, CheckpointException)


@dataclass(frozen=True)
class FolderRanks:
    """The ranks of a group, or one process alone, which asks no other."""

    group: dist.ProcessGroup | None
    alone: bool

    @property
    def first(self) -> bool:
        """Whether this one writes what all have."""
        return self.alone or dist.get_rank(self.group) == 0

    def gathered(self, mine: T) -> list[T]:
        """What every rank has."""
        of_ranks: list[Any] = [mine]
        if not self.alone:
            of_ranks *= dist.get_world_size(self.group)
            dist.all_gather_object(of_ranks, mine, self.group)
        return of_ranks

    @contextmanager
    def agreed(self, wrong: str, instead: str) -> Iterator[None]:
        """What cannot be read or written inside, on any rank, all ranks raise with one sentence."""
        error: BaseException | None = None
        sentence = None
        try:
            yield
        except OptionError as refused:
            error, sentence = refused, str(refused)
        except _FAILURES as failed:
            error, sentence = failed, f"{wrong} ({_cause(failed)}); {instead}"
        told = next(filter(None, self.gathered(sentence)), None)
        if told is not None:
            raise OptionError(told) from error

    def write(self, folder: Path, tensors: dict[str, Any]) -> None:
        """Save the tensors that each rank has, under names of its own."""
        with self._taking_part() as options:
            save(tensors, checkpoint_id=folder, **options)

    def read(self, folder: Path, tensors: dict[str, Any]) -> None:
        """Fill the tensors with those of these names, whichever rank has saved them.

        Raises:
            ValueError: they are not there.
        """
        try:
            with self._taking_part() as options:
                load(tensors, checkpoint_id=folder, **options)
        except (CheckpointException, OSError, KeyError) as error:
            raise ValueError(f"{folder.name}: {type(error).__name__}") from error

    @contextmanager
    def _taking_part(self) -> Iterator[dict[str, Any]]:
        """Options of save and load: who takes part."""
        if not self.alone:
            yield {"process_group": self.group}
            return
        with warnings.catch_warnings():  # that there is no group
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield {"no_dist": True} if dist.is_initialized() else {}


def _cause(error: BaseException) -> str:
    """Of the first rank that failed, without its traceback."""
    failures = getattr(error, "failures", None)
    first = next(iter(failures.values()))[0] if failures else error
    return f"{type(first).__name__}: {first}"
