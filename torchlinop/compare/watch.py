"""A solver that neither multiplies nor returns is interrupted, as Ctrl-C would."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable
from typing import TypeVar

from torchlinop.compare.timed_operator import SolverHangs, TimedOperator

Found = TypeVar("Found")

_AGAIN = 1.0  # seconds until the next interruption of a solver that goes on


def watched(solve: Callable[[], Found], A: TimedOperator) -> Found:
    """What ``solve`` returns, unless it leaves A alone for as long as A may be multiplied.

    Another thread then raises SolverHangs in this one, and again every second. As with Ctrl-C it
    arrives at the next line of Python: after, not in, a call of compiled code, a sleep or a lock.

    Raises:
        SolverHangs: it was interrupted; ``A.refused`` says why.
    """
    if math.isinf(A.seconds):
        return solve()
    watch = _Watch(A)
    try:
        try:
            watch.begin()
            return solve()
        finally:
            watch.end()
    except SolverHangs:
        watch.end()  # an interruption may come just before the first end
        raise


class _Watch:
    """A thread that interrupts the one that made it."""

    def __init__(self, A: TimedOperator) -> None:
        self._operator = A
        self._watched = threading.get_ident()
        # A lock, which is let go by one call that no interruption can tear, unlike an Event.
        self._over = threading.Lock()
        self._over.acquire()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def begin(self) -> None:
        self._thread.start()

    def _watch(self) -> None:
        wait = self._operator.seconds
        while not self._over.acquire(timeout=min(wait, threading.TIMEOUT_MAX)):
            wait = self._operator.seconds - self._operator.idle()
            if wait <= 0:
                self._operator.give_up()
                _raise_in(self._watched, ctypes.py_object(SolverHangs))
                wait = _AGAIN

    def end(self) -> None:
        """No interruption comes after this; those that come meanwhile come too late."""
        while True:
            try:
                if self._over.locked():
                    self._over.release()
                self._thread.join()
                _raise_in(self._watched, None)  # takes back what has not arrived
                return
            except SolverHangs:
                continue


def _raise_in(thread: int, exception: ctypes.py_object[type[SolverHangs]] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), exception)
