"""The ways to estimate a trace, and which of them suits a matrix, a budget and a memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, Literal, Protocol

from torchlinop.algorithms.hutch_plus_plus import HutchPlusPlus, NonAdaptiveHutchPlusPlus
from torchlinop.algorithms.hutchinson import Estimate, Hutchinson
from torchlinop.algorithms.products import Products
from torchlinop.algorithms.xnystrace import XNysTrace
from torchlinop.algorithms.xtrace import XTrace
from torchlinop.errors import MemoryEstimateError, OptionError
from torchlinop.memory import free_bytes
from torchlinop.operators.base import CurvatureOperator
from torchlinop.space import Distribution, VectorSpace

Method = Literal["auto", "hutchinson", "hutch++", "na-hutch++", "xtrace", "xnystrace"]

_ENOUGH_FOR_A_SKETCH = 16  # with fewer products, too few samples are left for a standard error


class Estimator(Protocol):
    """A way to estimate a trace that goes on from what it has when more products are granted."""

    fewest: ClassVar[int]  # products
    vectors: ClassVar[float]  # kept, for every product
    usual: ClassVar[Distribution]

    def __init__(self, products: Products, distribution: Distribution, seed: int) -> None: ...

    @property
    def matvecs(self) -> int:
        """Products that the estimate would be made of; 0 while there is none."""
        ...

    def spend(self, num_matvecs: int) -> Iterator[None]:
        """Until so many products are spent in all; yields before every block of them."""
        ...

    def estimate(self) -> Estimate: ...


ESTIMATORS: dict[str, type[Estimator]] = {
    "hutchinson": Hutchinson,
    "hutch++": HutchPlusPlus,
    "na-hutch++": NonAdaptiveHutchPlusPlus,
    "xtrace": XTrace,
    "xnystrace": XNysTrace,
}


def suitable(op: CurvatureOperator, num_matvecs: int) -> str:
    """The most accurate method whose vectors fit half of the free memory."""
    if num_matvecs < _ENOUGH_FOR_A_SKETCH:
        return "hutchinson"
    order = ["xtrace", "hutch++", "hutchinson"]
    if op.positive_semidefinite:
        order.insert(0, "xnystrace")
    room = free_bytes(op.device) // 2
    space = op.space
    return next(m for m in order if not space.agree(_bytes(space, m, num_matvecs) > room))


def affordable(op: CurvatureOperator, name: str, num_matvecs: int, *, fewer: bool) -> int:
    """How many products to take: those asked for, or ``fewer`` where that is allowed.

    Raises:
        OptionError: they are fewer than the method needs.
        MemoryEstimateError: their vectors do not fit into the memory that is free.
    """
    space, fewest = op.space, ESTIMATORS[name].fewest
    if num_matvecs >= space.size:  # exact: no vectors are kept
        return num_matvecs
    if num_matvecs < fewest:
        raise OptionError(
            f'expected num_matvecs to be at least {fewest} for method="{name}", got {num_matvecs}; '
            'raise it, or use method="hutchinson"'
        )
    free, needed = free_bytes(space.device), _bytes(space, name, num_matvecs)
    if not space.agree(needed > free):
        return num_matvecs
    fitting = int(space.least(free / max(1.0, _bytes(space, name, 1))))
    if fewer and fitting >= fewest:
        return fitting
    vectors = math.ceil(ESTIMATORS[name].vectors * num_matvecs)
    raise MemoryEstimateError(
        f'method="{name}" with {num_matvecs} products needs {vectors} vectors x '
        f"{space.local_size:,} x {_itemsize(space)} B = {needed / 1e9:.1f} GB on {space.device} "
        f'({free / 1e9:.1f} GB free). Try num_matvecs={fitting}, or method="hutchinson"'
    )


def _bytes(space: VectorSpace, name: str, num_matvecs: int) -> float:
    return ESTIMATORS[name].vectors * num_matvecs * space.local_size * _itemsize(space)


def _itemsize(space: VectorSpace) -> int:
    return max(4, space.dtype.itemsize)
