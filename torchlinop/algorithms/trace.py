"""tr A from products, with a standard error that can be believed."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypedDict, Unpack, get_args

import torch

from torchlinop.algorithms.early_stop import announced, notes, taken
from torchlinop.algorithms.hutchinson import Estimate, unseen
from torchlinop.algorithms.probes import (
    checked_seed,
    forms,
    on_host,
    real_part,
    refuse_num_matvecs,
    unit_vectors,
)
from torchlinop.algorithms.products import Products, run_of_products
from torchlinop.algorithms.sizes import given, refuse_non_numbers
from torchlinop.algorithms.trace_method import (
    ESTIMATORS,
    Estimator,
    Method,
    affordable,
    suitable,
)
from torchlinop.algorithms.trace_result import TraceResult
from torchlinop.algorithms.unit_scale import UnitScale
from torchlinop.choices import refuse_unknown, refuse_unknown_options
from torchlinop.errors import NotConvergedError, OptionError
from torchlinop.operators.base import CurvatureOperator
from torchlinop.space import Distribution

log = logging.getLogger("torchlinop")

_USUAL = 60  # products, if neither their number nor an accuracy is asked for
_FIRST, _MOST = 32, 1000  # products before the first look at an accuracy, and at most


def trace(
    op: CurvatureOperator,
    num_matvecs: int | None = None,
    *,
    rtol: float | None = None,
    method: Method = "auto",
    distribution: Distribution | None = None,
    seed: int = 0,
    max_seconds: float = math.inf,
    progress: bool = False,
) -> TraceResult:
    """Estimate tr A from ``num_matvecs`` products, or as many as ``rtol`` needs.

    Exact, by n products, if so many are granted. With ``rtol``, products are doubled until twice
    the standard error is at most ``rtol |estimate|``; ``num_matvecs`` (1,000) is then the most.
    Products already taken are used again. Ctrl-C returns the estimate from the products taken so
    far, if there is one: after the first block of 16 (XTrace 32, Hutch++ and NA-Hutch++ 32).

    Args:
        op: any operator; of a Hermitian one, the real part is used, which has the same trace.
        num_matvecs: products to spend, 60 unless given; an odd one XTrace leaves unspent.
        rtol: relative accuracy.
        method: ``"xtrace"`` is the most accurate, unless the spectrum is flat; ``"hutch++"`` keeps
            a fifth as many vectors and ``"hutchinson"`` none. ``"xnystrace"`` is for A ≥ 0, and
            the best one there. ``"auto"`` takes XNysTrace if ``op.positive_semidefinite``, else
            the first of the others that fits half of the free memory (Hutchinson below 16
            products). ``"na-hutch++"`` takes all products at once.
        distribution: of the probes; ``"sphere"`` for XTrace and XNysTrace, which it makes more
            accurate, and ``"rademacher"`` otherwise.
        seed: of the probes, each of which depends on the seed and its own number.
        max_seconds: return what there is after this time, once there is an estimate.
        progress: show a bar that counts products, on a terminal.

    Raises:
        OptionError: an unknown option, or fewer products than the method needs.
        MemoryEstimateError: the vectors to keep do not fit into the memory that is free.
        NonFiniteError: a product holds NaN or infinity.
        SymmetryError, DefinitenessError: A is not what ``"xtrace"`` or ``"xnystrace"`` needs.
        NotConvergedError: time was over before n products, and there is no estimate.

    Example:
        >>> from torchlinop import LambdaOperator
        >>> trace(LambdaOperator(3, lambda v: 2.0 * v)).estimate
        6.0
    """
    _refuse_options(num_matvecs, rtol, method, distribution)
    seed = checked_seed(seed)
    A = UnitScale(real_part(op))
    budget = num_matvecs or (_USUAL if rtol is None else _MOST)
    name = suitable(A, budget) if method == "auto" else method
    budget = affordable(A, name, budget, fewer=rtol is not None)
    log.info("trace by %s, of at most %d products", name, budget)
    kind = ESTIMATORS[name]
    with run_of_products(A, total=budget, max_seconds=max_seconds, progress=progress) as products:
        estimator = kind(products, distribution or kind.usual, seed)
        found = _found(products, estimator, budget, rtol)
    found = found.times(A.scale)
    warnings = (*notes(found.stopped, products, budget), *_missed(found, products, rtol))
    result = TraceResult(
        estimate=found.estimate.value,
        stderr=found.estimate.stderr,
        samples=found.estimate.samples,
        method="exact" if found.exact else name,
        distribution="unit vectors" if found.exact else distribution or kind.usual,
        matvecs=products.matvecs,
        operator_size=op.size,
        converged=not warnings,
        rtol=rtol,
        seed=seed,
        dtype=op.dtype,
        seconds=products.seconds,
        warnings=warnings,
    )
    return announced(result)


class TraceOptions(TypedDict, total=False):
    """Keywords of ``trace``, which explains them."""

    rtol: float | None
    distribution: Distribution | None
    seed: int
    max_seconds: float
    progress: bool


_KEYWORDS = TraceOptions.__optional_keys__ | {"num_matvecs"}


def hutchinson(
    op: CurvatureOperator, num_matvecs: int | None = None, **options: Unpack[TraceOptions]
) -> TraceResult:
    """``trace`` by the mean of ωᵀAω."""
    refuse_unknown_options(options, _KEYWORDS)
    return trace(op, num_matvecs, method="hutchinson", **options)


def hutch_plus_plus(
    op: CurvatureOperator, num_matvecs: int | None = None, **options: Unpack[TraceOptions]
) -> TraceResult:
    """``trace`` exactly on a sketched subspace, and by probes outside of it."""
    refuse_unknown_options(options, _KEYWORDS)
    return trace(op, num_matvecs, method="hutch++", **options)


def xtrace(
    op: CurvatureOperator, num_matvecs: int | None = None, **options: Unpack[TraceOptions]
) -> TraceResult:
    """``trace`` by Hutch++ in which every probe is used for all purposes."""
    refuse_unknown_options(options, _KEYWORDS)
    return trace(op, num_matvecs, method="xtrace", **options)


def xnystrace(
    op: CurvatureOperator, num_matvecs: int | None = None, **options: Unpack[TraceOptions]
) -> TraceResult:
    """``trace`` of A ≥ 0 by Nyström approximations."""
    refuse_unknown_options(options, _KEYWORDS)
    return trace(op, num_matvecs, method="xnystrace", **options)


@dataclass(frozen=True)
class _Found:
    estimate: Estimate
    exact: bool = False
    stopped: str = ""  # why, before all products were spent

    def times(self, scale: float) -> _Found:
        scaled = Estimate(self.estimate.samples * scale, self.estimate.stderr * scale)
        return replace(self, estimate=scaled)

    def accurate(self, rtol: float) -> bool:
        return 2 * self.estimate.stderr <= rtol * abs(self.estimate.value)


def _found(products: Products, estimator: Estimator, budget: int, rtol: float | None) -> _Found:
    """The estimate by ``budget`` products, or by the first doubling that is accurate."""
    n, stopped, found = products.operator.size, "", None
    for target in _rounds(budget, n, rtol):
        if target >= n and products.matvecs + n <= budget:
            return _exact(products, found)
        granted = min(target, n - 1)
        stopped = taken(products, estimator.spend(granted), lambda: estimator.matvecs)
        if rtol is not None:
            found = _estimated(products, estimator, stopped)
        if stopped or (found and rtol and found.accurate(rtol)):
            break
    return found or _estimated(products, estimator, stopped)


def _exact(products: Products, found: _Found | None) -> _Found:
    """By n products; what was ``found`` before, if there is no time for them."""
    try:
        diagonal = torch.cat([forms(products, E) for E in unit_vectors(products)])
    except (KeyboardInterrupt, NotConvergedError) as error:
        if found is None:
            raise
        time_is_over = isinstance(error, NotConvergedError)
        return replace(found, stopped="out of time" if time_is_over else "interrupted")
    (total,) = on_host(products, diagonal.sum()[None])
    return _Found(Estimate(total, 0.0), exact=True)


def _estimated(products: Products, estimator: Estimator, stopped: str) -> _Found:
    found = estimator.estimate()
    rounding = unseen(products.operator.dtype) * max(abs(found.value), found.magnitude)
    return _Found(replace(found, stderr=max(found.stderr, rounding)), stopped=stopped)


def _rounds(budget: int, n: int, rtol: float | None) -> Iterator[int]:
    """Products to have spent at the next look: doubled, so that there is an estimate early."""
    target = min(_FIRST, budget)
    while target < budget and (rtol is not None or budget < n):
        yield target
        target *= 2
    yield budget


def _missed(found: _Found, products: Products, rtol: float | None) -> tuple[str, ...]:
    if rtol is None or found.accurate(rtol):
        return ()
    value = found.estimate.value
    reached = 2 * found.estimate.stderr / abs(value) if value else math.inf
    return (
        f"after {products.matvecs} products, twice the standard error is {reached:.1g} of the "
        f"estimate {value:.4g}; rtol={rtol:g} was asked for. Raise num_matvecs or rtol",
    )


def _refuse_options(
    num_matvecs: int | None, rtol: float | None, method: str, distribution: str | None
) -> None:
    if num_matvecs is not None:
        refuse_num_matvecs(num_matvecs)
    refuse_non_numbers(**given(rtol=rtol))
    if rtol is not None and not 0 < rtol < math.inf:
        raise OptionError(f"expected rtol to be above 0, got {rtol}; 0.01, say")
    refuse_unknown("method", method, get_args(Method))
    if distribution is not None:
        refuse_unknown("distribution", distribution, get_args(Distribution))
