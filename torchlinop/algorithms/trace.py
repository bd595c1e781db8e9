"""tr A from products, with a standard error that can be believed: the choice of a method."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal, Protocol, get_args

import torch

from torchlinop.algorithms.hutch_plus_plus import HutchPlusPlus, NonAdaptiveHutchPlusPlus
from torchlinop.algorithms.hutchinson import Estimate, Hutchinson
from torchlinop.algorithms.probes import (
    forms,
    on_host,
    real_part,
    refuse_num_matvecs,
    refuse_seed,
    unit_vectors,
)
from torchlinop.algorithms.trace_result import TraceResult
from torchlinop.algorithms.xnystrace import XNysTrace
from torchlinop.algorithms.xtrace import XTrace
from torchlinop.errors import MemoryEstimateError, NotConvergedWarning, OptionError, warn_caller
from torchlinop.memory import free_bytes
from torchlinop.operators.base import CurvatureOperator
from torchlinop.space import Distribution, VectorSpace

Method = Literal["auto", "hutchinson", "hutch++", "na-hutch++", "xtrace", "xnystrace"]

_USUAL = 60  # products, if neither their number nor an accuracy is asked for
_FIRST, _MOST = 32, 1000  # products before the first look at an accuracy, and at most
_ENOUGH_FOR_A_SKETCH = 16  # with fewer products, too few samples are left for a standard error


class Estimator(Protocol):
    """A way to estimate a trace that goes on from what it has when more products are granted."""

    fewest: ClassVar[int]  # products
    vectors: ClassVar[float]  # kept, for every product
    usual: ClassVar[Distribution]
    matvecs: int

    def __init__(self, op: CurvatureOperator, distribution: Distribution, seed: int) -> None: ...
    def spend(self, num_matvecs: int) -> None: ...
    def estimate(self) -> Estimate: ...


_ESTIMATORS: dict[str, type[Estimator]] = {
    "hutchinson": Hutchinson,
    "hutch++": HutchPlusPlus,
    "na-hutch++": NonAdaptiveHutchPlusPlus,
    "xtrace": XTrace,
    "xnystrace": XNysTrace,
}


def trace(
    op: CurvatureOperator,
    num_matvecs: int | None = None,
    *,
    rtol: float | None = None,
    method: Method = "auto",
    distribution: Distribution | None = None,
    seed: int = 0,
) -> TraceResult:
    """Estimate tr A from ``num_matvecs`` products, or as many as ``rtol`` needs.

    Exact, by n products, if so many are granted. With ``rtol``, products are doubled until twice
    the standard error is at most ``rtol |estimate|``; ``num_matvecs`` (1,000) is then the most.
    Products already taken are used again.

    Args:
        op: any operator; of a Hermitian one, the real part is used, which has the same trace.
        num_matvecs: products to spend, 60 unless given; an odd one XTrace leaves unspent.
        rtol: relative accuracy.
        method: ``"xtrace"`` is the most accurate, unless the spectrum is flat; ``"hutch++"`` keeps
            a fifth as many vectors and ``"hutchinson"`` none. ``"auto"`` takes the first of these
            that fits the memory (Hutchinson below 16 products). ``"xnystrace"`` is for A ≥ 0, and
            the best one there. ``"na-hutch++"`` takes all products at once.
        distribution: of the probes; ``"sphere"`` for XTrace and XNysTrace, which it makes more
            accurate, and ``"rademacher"`` otherwise.
        seed: of the probes, each of which depends on the seed and its own number.

    Raises:
        OptionError: an unknown option, or fewer products than the method needs.
        MemoryEstimateError: the vectors to keep do not fit into the memory that is free.
        NonFiniteError: a product holds NaN or infinity.
        SymmetryError, DefinitenessError: A is not what ``"xtrace"`` or ``"xnystrace"`` needs.

    Example:
        >>> from torchlinop import LambdaOperator
        >>> trace(LambdaOperator(3, lambda v: 2.0 * v)).estimate
        6.0
    """
    start = time.perf_counter()
    _refuse_options(num_matvecs, rtol, method, distribution)
    refuse_seed(seed)
    A = real_part(op)
    budget = num_matvecs or (_USUAL if rtol is None else _MOST)
    name = _affordable(A.space, budget) if method == "auto" else method
    kind = _ESTIMATORS[name]
    budget = _within_memory(A.space, name, budget, rtol is not None)
    if budget < min(kind.fewest, A.size):
        raise OptionError(
            f'expected num_matvecs to be at least {kind.fewest} for method="{name}", got {budget}; '
            'raise it, or use method="hutchinson"'
        )
    estimator = kind(A, distribution or kind.usual, seed)
    spent, exact, converged = 0, False, False
    for target in [budget] if rtol is None else _doublings(budget):
        exact = target >= A.size and spent + A.size <= budget
        most = min(target, A.size - 1)
        found, spent = _exact(A, spent) if exact else _estimated(estimator, most, A.dtype)
        converged = exact or rtol is None or 2 * found.stderr <= rtol * abs(found.value)
        if converged:
            break
    warnings = () if converged else (_missed(rtol or 0.0, found, spent),)
    for warning in warnings:
        warn_caller(warning, NotConvergedWarning)
    return TraceResult(
        estimate=found.value,
        stderr=found.stderr,
        samples=found.samples,
        method="exact" if exact else name,
        distribution="unit vectors" if exact else distribution or kind.usual,
        matvecs=spent,
        operator_size=op.size,
        converged=converged,
        rtol=rtol,
        seed=seed,
        dtype=op.dtype,
        seconds=time.perf_counter() - start,
        warnings=warnings,
    )


def hutchinson(
    op: CurvatureOperator,
    num_matvecs: int = 60,
    *,
    distribution: Distribution = "rademacher",
    seed: int = 0,
) -> TraceResult:
    """Estimate tr A by the mean of ωᵀAω; see ``trace``."""
    return trace(op, num_matvecs, method="hutchinson", distribution=distribution, seed=seed)


def hutch_plus_plus(
    op: CurvatureOperator,
    num_matvecs: int = 60,
    *,
    distribution: Distribution = "rademacher",
    seed: int = 0,
) -> TraceResult:
    """Estimate tr A exactly on a sketched subspace, and by probes outside of it; see ``trace``."""
    return trace(op, num_matvecs, method="hutch++", distribution=distribution, seed=seed)


def xtrace(
    op: CurvatureOperator,
    num_matvecs: int = 60,
    *,
    distribution: Distribution = "sphere",
    seed: int = 0,
) -> TraceResult:
    """Estimate tr A by Hutch++ in which every probe is used for all purposes; see ``trace``."""
    return trace(op, num_matvecs, method="xtrace", distribution=distribution, seed=seed)


def xnystrace(
    op: CurvatureOperator,
    num_matvecs: int = 60,
    *,
    distribution: Distribution = "sphere",
    seed: int = 0,
) -> TraceResult:
    """Estimate the trace of A ≥ 0 by Nyström approximations; see ``trace``."""
    return trace(op, num_matvecs, method="xnystrace", distribution=distribution, seed=seed)


def _exact(op: CurvatureOperator, spent: int) -> tuple[Estimate, int]:
    diagonal = torch.cat([forms(op, E) for E in unit_vectors(op.space)])
    (total,) = on_host(op, diagonal.sum()[None])
    return Estimate(total, 0.0), spent + op.size


def _estimated(estimator: Estimator, num_matvecs: int, dtype: torch.dtype) -> tuple[Estimate, int]:
    estimator.spend(num_matvecs)
    found = estimator.estimate()
    rounding = torch.finfo(dtype).eps * abs(found.value)  # what no probe can see
    return replace(found, stderr=max(found.stderr, rounding)), estimator.matvecs


def _doublings(budget: int) -> Iterator[int]:
    target = min(_FIRST, budget)
    while target < budget:
        yield target
        target *= 2
    yield budget


def _affordable(space: VectorSpace, num_matvecs: int) -> str:
    """The most accurate method whose vectors fit half of the free memory."""
    if num_matvecs < _ENOUGH_FOR_A_SKETCH:
        return "hutchinson"
    room = free_bytes(space.device) // 2
    a_vector = space.size * max(4, space.dtype.itemsize)
    order = ("xtrace", "hutch++", "hutchinson")
    return next(m for m in order if _ESTIMATORS[m].vectors * num_matvecs * a_vector <= room)


def _within_memory(space: VectorSpace, name: str, num_matvecs: int, fewer: bool) -> int:
    """How many products to take: those asked for, or fewer where that is allowed.

    Raises:
        MemoryEstimateError: their vectors do not fit into the memory that is free.
    """
    vectors, fewest = _ESTIMATORS[name].vectors, _ESTIMATORS[name].fewest
    free, a_vector = free_bytes(space.device), space.size * max(4, space.dtype.itemsize)
    fitting = int(free / (vectors * a_vector)) if vectors else num_matvecs
    if num_matvecs <= fitting or num_matvecs >= space.size:  # the latter keep none: exact
        return num_matvecs
    if fewer and fitting >= fewest:
        return fitting
    needed = math.ceil(vectors * num_matvecs)
    raise MemoryEstimateError(
        f'method="{name}" with {num_matvecs} products needs {needed} vectors x {space.size:,} x '
        f"{a_vector // space.size} B = {needed * a_vector / 1e9:.1f} GB on {space.device} "
        f'({free / 1e9:.1f} GB free). Try num_matvecs={fitting}, or method="hutchinson"'
    )


def _missed(rtol: float, found: Estimate, spent: int) -> str:
    reached = 2 * found.stderr / abs(found.value) if found.value else math.inf
    return (
        f"after {spent} products, twice the standard error is {reached:.1g} of the estimate "
        f"{found.value:.4g}; rtol={rtol:g} was asked for. Raise num_matvecs or rtol"
    )


def _refuse_options(
    num_matvecs: int | None, rtol: float | None, method: str, distribution: str | None
) -> None:
    if num_matvecs is not None:
        refuse_num_matvecs(num_matvecs)
    if rtol is not None and not 0 < rtol < math.inf:
        raise OptionError(f"expected rtol to be above 0, got {rtol}; 0.01, say")
    for name, value, choices in (
        ("method", method, get_args(Method)),
        ("distribution", distribution, (None, *get_args(Distribution))),
    ):
        if value not in choices:
            listed = ", ".join(str(choice) for choice in choices if choice)
            raise OptionError(f"unknown {name} {value!r}; choose one of {listed}")
