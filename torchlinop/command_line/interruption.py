"""Ctrl-C, and the signal that ends a job, heard in products alone: never halfway through a step."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from torch import Tensor

from torchlinop.operators.base import CurvatureOperator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Interruptible(CurvatureOperator):
    """The same matrix. A product raises KeyboardInterrupt if a signal came in it, or before."""

    def __init__(self, operator: CurvatureOperator) -> None:
        super().__init__(
            operator.space,
            layout=operator.layout,
            description=operator.description,
            notes=operator.notes,
            positive_semidefinite=operator.positive_semidefinite,
        )
        self.operator = operator
        self._inside = self._pending = False

    def hear(self, number: int, frame: FrameType | None) -> None:
        """A signal. The second one does not wait for a product."""
        if self._inside or self._pending:
            self._pending = False
            raise KeyboardInterrupt
        self._pending = True
        print("stopping at the next product; once more to stop at once", file=sys.stderr)

    def _matmat(self, V: Tensor) -> Tensor:
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt
        self._inside = True
        try:
            return self.operator.matmat(V)
        finally:
            self._inside = False

    def __repr__(self) -> str:
        return repr(self.operator)


@contextmanager
def interruptible(operator: CurvatureOperator) -> Iterator[CurvatureOperator]:
    """The operator for a run that can be stopped, and gone on with bit by bit."""
    heard = _Interruptible(operator)
    if threading.current_thread() is not threading.main_thread():  # signals are heard there alone
        yield heard
        return
    before = {number: signal.signal(number, heard.hear) for number in _SIGNALS}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
