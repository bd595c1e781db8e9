"""The matrix as a solver sees it: products counted, timed, and refused when a budget is spent."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from torchlinop.errors import ProductBudgetError
from torchlinop.operators.base import CurvatureOperator
from torchlinop.operators.counting import CountingOperator

_PATIENCE = 1000  # refused products, after which a solver that goes on is taken out


class SolverHangs(BaseException):
    """A solver goes on and on, with products refused or none; no ``except Exception`` holds it."""


class TimedOperator(CountingOperator):
    """The same matrix, whose products tell when a run has spent its products or its seconds.

    A product beyond either raises ProductBudgetError, so that no loop of products is endless.
    """

    def __init__(
        self,
        operator: CurvatureOperator,
        budget: int | None = None,
        seconds: float = math.inf,
        *,
        within: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        super().__init__(operator, budget)
        self.product_seconds = 0.0
        self.refused = ""  # why a product was, if any
        self.seconds = seconds
        self.left_alone = False  # for longer than that, by a solver that had to be interrupted
        self._refusals = 0
        self._within = within  # what a product is wrapped in, by those who measure memory, say
        self._started = self._left = time.perf_counter()
        self._inside = False

    def _matmat(self, V: Tensor) -> Tensor:
        self._refuse(V.shape[1])
        began = self._now()
        self._inside = True
        try:
            with self._within():
                AV = super()._matmat(V)
        finally:
            self._left = self._now()
            self._inside = False
        self.product_seconds += self._left - began
        return AV

    def idle(self) -> float:
        """Seconds since the last product, or the start; none inside a product."""
        return 0.0 if self._inside else time.perf_counter() - self._left

    def give_up(self) -> None:
        """To be told of a solver that is idle for too long."""
        self.left_alone = True
        self.refused = f"out of time: no product and no answer for {self.seconds:g} s"

    def _refuse(self, columns: int) -> None:
        budget = self.count.max_matvecs
        if budget is not None and self.matvecs + columns > budget:
            self.refused = f"budget spent: {budget:,} products"
        elif time.perf_counter() - self._started > self.seconds:
            self.refused = f"out of time: {self.seconds:g} s"
        else:
            return
        self._refusals += 1
        if self._refusals > _PATIENCE:
            raise SolverHangs(self.refused)
        raise ProductBudgetError(
            f"{self.refused}, and {columns} more asked for after {self.matvecs:,}; raise budget "
            "or seconds, or ask the solver for less"
        )

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a product is over when the device is
        return time.perf_counter()
