"""A_t v with a matrix of its own each step: products that are independent of each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from torchlinop.algorithms.given_operator import refuse_no_operator
from torchlinop.algorithms.products import Products
from torchlinop.errors import OptionError, VectorError
from torchlinop.operators.base import CurvatureOperator

Operators = Callable[[int], CurvatureOperator] | Sequence[CurvatureOperator]


class Draws:
    """The operator of every step, all of one space."""

    def __init__(self, operators: Operators, seed: int) -> None:
        self._operators = operators
        self._random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))
        if not callable(operators):
            _refuse_no_list(operators)
        self.first = self._drawn(0)

    def operator(self, t: int) -> CurvatureOperator:
        """The operator of step t, asked for in order."""
        op = self._drawn(t) if t else self.first
        if op.space != self.first.space:
            raise VectorError(
                f"expected operators on one space, got {self.first!r} and {op!r}; "
                "build all from the same parameters, dtype and device"
            )
        return op

    def _drawn(self, t: int) -> CurvatureOperator:
        if callable(self._operators):
            op = self._operators(t)
        else:
            op = self._operators[int(self._random.integers(len(self._operators)))]
        refuse_no_operator(op, f"the operator of step {t}")
        return op


def _refuse_no_list(operators: object) -> None:
    if not isinstance(operators, Sequence):
        raise OptionError(
            "expected operators to be a list, or a function of the step, got "
            f"{type(operators).__name__}; pass lambda t: HessianOperator(...), say"
        )
    if not operators:
        raise OptionError("expected at least one operator, got none; pass one a minibatch")


@dataclass
class FreshProducts:
    """Steps with an operator each, until there is no more time."""

    draws: Draws
    products: Products
    status: str = "complete"

    def product(self, v: Tensor) -> Tensor:
        """``A_t v`` (n, 1) with the operator of this step."""
        self.products.operator = self.draws.operator(self.products.matvecs)
        return self.products.columns(v)

    def steps(self, count: int, step: Callable[[], object]) -> int:
        """Take so many steps, fewer after max_seconds or Ctrl-C; how many were taken."""
        for i in range(count):
            if self.products.late:
                self.status = "maxseconds"
            if self.status != "complete":
                return i
            try:
                step()
            except KeyboardInterrupt:
                if not self.products.matvecs:
                    raise
                self.status = "interrupted"
                return i
        return count
