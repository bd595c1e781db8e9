"""Probes ω: column i of a stream is a function of (seed, stream, i); products and forms ωᵀ A ω."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from torchlinop.algorithms.given_operator import refuse_no_operator
from torchlinop.algorithms.products import Products, working_dtype
from torchlinop.algorithms.sizes import refuse_fractions
from torchlinop.errors import NotConvergedError, OptionError
from torchlinop.operators.base import CurvatureOperator
from torchlinop.space import Distribution, VectorSpace

WIDTH = 16  # columns to a product where nothing is kept: the most that operators take in one pass


@dataclass(frozen=True)
class Probes:
    """A stream of independent isotropic columns, E[ω ωᵀ] = I, the same in whatever chunks."""

    space: VectorSpace
    distribution: Distribution
    seed: int
    stream: int

    def columns(self, start: int, stop: int) -> Tensor:
        """Columns ``start`` to ``stop`` (n, stop - start), at least in float32."""
        rows = [self._column(i) for i in range(start, stop)]
        return torch.stack(rows).to(working_dtype(self.space.dtype)).mT

    def chunks(self, start: int, stop: int) -> Iterator[Tensor]:
        """The same columns, at most ``WIDTH`` at a time."""
        for i in range(start, stop, WIDTH):
            yield self.columns(i, min(i + WIDTH, stop))

    def _column(self, i: int) -> Tensor:
        own = np.random.SeedSequence(self.seed, spawn_key=(self.stream, i))
        state = own.generate_state(1, np.uint64)
        return self.space.random(1, int(state[0]), self.distribution)[:, 0]


def unit_vectors(products: Products) -> Iterator[Tensor]:
    """All unit vectors, at most ``WIDTH`` at a time, (n, WIDTH) each: for an exact answer.

    Raises:
        NotConvergedError: the time of the run is over.
    """
    n, space = products.operator.size, products.operator.space
    for start in range(0, n, WIDTH):
        if products.late:
            raise NotConvergedError(
                f"time was over before the {n} products of an exact answer were taken; raise "
                "max_seconds, or ask for an estimate from fewer: num_matvecs=60, say"
            )
        width = min(WIDTH, n - start)
        yield space.unit_vectors(start, start + width).to(products.dtype)


def forms(products: Products, X: Tensor) -> Tensor:
    """``xᵀ A x`` of every column, (k,) in double precision. Costs k products."""
    return products.dots(X, products(X))


def on_host(products: Products, *small: Tensor) -> list[Tensor]:
    """Small tensors on the CPU.

    Raises:
        NonFiniteError: one of them is not finite, as products of the operator were not.
    """
    tensors = [tensor.cpu() for tensor in small]
    products.refuse_non_finite(*tensors)
    return tensors


def refuse_num_matvecs(num_matvecs: int) -> None:
    """Raise OptionError unless there are products to spend."""
    refuse_fractions(num_matvecs=num_matvecs)
    if num_matvecs < 1:
        raise OptionError(
            f"expected num_matvecs to be at least 1, got {num_matvecs}; leave it out for the usual"
        )


def checked_seed(seed: int) -> int:
    """The seed as an int, whatever integer it was: files and results hold it.

    Raises:
        OptionError: it is no integer, or negative.
    """
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if number < 0:
        raise OptionError(f"expected seed to be an integer from 0 on, got {seed!r}; leave it out")
    return number


def real_part(op: CurvatureOperator) -> CurvatureOperator:
    """Re A: a real symmetric matrix with the trace and the diagonal of a Hermitian A."""
    refuse_no_operator(op)
    return RealPart(op) if op.dtype.is_complex else op


class RealPart(CurvatureOperator):
    """The real part of a Hermitian operator. A product costs one of it."""

    def __init__(self, operator: CurvatureOperator) -> None:
        space = replace(operator.space, dtype=operator.dtype.to_real())
        super().__init__(
            space,
            layout=operator.layout,
            description=[f"real part of {operator!r}"],
            positive_semidefinite=operator.positive_semidefinite,
        )
        self.operator = operator

    def _matmat(self, V: Tensor) -> Tensor:
        return self.operator.matmat(V.to(self.operator.dtype)).real.contiguous()
