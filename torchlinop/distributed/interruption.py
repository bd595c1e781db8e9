"""Ctrl-C on several ranks: noted when it comes, raised by all ranks after the same sum."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor

from torchlinop.algorithms.late_look import LateLook


class Interruption:
    """Whether this rank was interrupted during a run, and whether the run has been told."""

    def __init__(self) -> None:
        self.asked = self.raised = False
        self._look = LateLook()  # on a GPU, one sum later: the host does not wait for it

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signal."""
        self.asked = True

    def settle(self, asked: Tensor) -> None:
        """Raise KeyboardInterrupt, once, if any rank was interrupted: ``asked`` counts them."""
        if bool(self._look(asked > 0).any()):
            self.stop()

    def stop(self) -> None:
        """Raise KeyboardInterrupt, once: to be called by all ranks in the same place."""
        if not self.raised:
            self.raised = True
            raise KeyboardInterrupt


_runs: list[Interruption] = []  # under way; signals come to the main thread alone


def current() -> Interruption | None:
    """That of the run which is under way, if there is one."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    return _runs[-1] if _runs and in_main_thread else None


@contextmanager
def interrupted_together() -> Iterator[None]:
    """Inside, Ctrl-C waits for the next sum over ranks, where all ranks raise it.

    A rank that left its products at once would leave the others waiting. One that comes while
    the run winds up is dropped; one after the last sum is raised at the end.
    """
    if _runs or threading.current_thread() is not threading.main_thread():
        yield
        return
    run = Interruption()
    before = signal.signal(signal.SIGINT, run.note)
    _runs.append(run)
    try:
        yield
    finally:
        _runs.remove(run)
        signal.signal(signal.SIGINT, before)
    if run.asked and not run.raised:
        raise KeyboardInterrupt


def with_flag(numbers: Tensor, flag: bool) -> Tensor:
    """A vector of these numbers, and one more that tells of the flag."""
    return torch.cat([numbers.flatten(), numbers.new_full((1,), float(flag))])
