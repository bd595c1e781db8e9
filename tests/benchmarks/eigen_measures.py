"""What a solver's answer is worth: true errors and residuals, and whether its claims hold."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
import tracemalloc
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from eigen_candidates import Candidate
from eigen_requests import Answer, Request
from pretend_device import Device, Usage
from solver_problems import Counted, Matrix
from torch import Tensor

SLACK = 1.1  # between a claim and the truth, beside ten roundoffs of ‖A‖
TOLERANCES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12)
_ROUNDING = 10 * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Row:
    """One solver on one matrix; what depends on the seed is that of the worst seed."""

    columns: int = 0  # products, the median
    calls: int = 0
    vectors: float = math.nan  # of length n held at most, with the last product
    reads: int = 0  # by the host
    seconds: float = math.nan  # the median
    product_seconds: float = math.nan  # of these, inside products
    error: float = math.nan  # the largest |θ_i − λ_i| / |λ_i|
    residual: float = math.nan  # the largest ‖A x − θ x‖ / |θ|
    claimed: float = math.nan  # its own idea of that
    converged: int | None = None  # pairs that it calls converged, the most of a seed
    false: tuple[str, ...] = ()  # claims that do not hold, of the seed with the most
    false_seeds: int = 0  # seeds with such claims
    claims: bool = False  # whether it makes any
    failure: str = ""


def measure(matrix: Matrix, candidate: Candidate, request: Request, repetitions: int) -> Row:
    """A run for every seed, and another one for the memory."""
    request = replace(request, which=candidate.which)
    requests = [replace(request, seed=seed) for seed in range(repetitions)]
    try:
        runs = [run(matrix, candidate, r) for r in requests]
        usage = used(matrix, candidate, request)
    except ImportError as error:
        return Row(failure=f"not installed ({error.name})")
    except Exception as error:  # others' failures are rows
        return Row(failure=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:90]}")
    judged = [judge(matrix, answer, request) for answer, _, _ in runs]
    return Row(
        columns=statistics.median_low([A.columns for _, A, _ in runs]),
        calls=statistics.median_low([A.calls for _, A, _ in runs]),
        vectors=usage.peak,
        reads=usage.reads,
        seconds=statistics.median(seconds for _, _, seconds in runs),
        product_seconds=statistics.median(
            sum(end - began for began, end in A.spans) for _, A, _ in runs
        ),
        error=max(j.error for j in judged),
        residual=max(j.residual for j in judged),
        claimed=max(j.claimed for j in judged),
        converged=max((j.converged for j in judged if j.converged is not None), default=None),
        false=max((j.false for j in judged), key=len),
        false_seeds=sum(bool(j.false) for j in judged),
        claims=any(j.claims for j in judged),
    )


def run(matrix: Matrix, candidate: Candidate, request: Request) -> tuple[Answer, Counted, float]:
    """The answer, the products it took, and its seconds."""
    A = Counted(matrix)
    with silence():  # what the warnings say is in the table: claims and errors
        started = time.perf_counter()
        answer = candidate.solve(A, request)
        return answer, A, time.perf_counter() - started


@contextlib.contextmanager
def silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def used(matrix: Matrix, candidate: Candidate, request: Request) -> Usage:
    """The vectors that a solver holds at most, and how often the host waits for a device.

    Of NumPy's solvers, traced memory; every call sends vectors to the host and back.
    """
    if candidate.on_host:
        A = Counted(matrix)
        tracemalloc.start()
        with silence():
            candidate.solve(A, request)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return Usage(A.calls, math.nan, math.nan, peak / (8 * matrix.size))
    with silence(), Device(matrix.size) as device:
        candidate.solve(Counted(matrix, device), request)
    return device.usage


# Truth and claims


@dataclass(frozen=True)
class Judged:
    """One answer."""

    error: float
    residual: float
    claimed: float
    converged: int | None
    claims: bool
    false: tuple[str, ...]


def judge(matrix: Matrix, answer: Answer, request: Request) -> Judged:
    values = answer.eigenvalues.double()
    X = answer.eigenvectors.double()
    X = X / X.norm(dim=0)
    residuals = (matrix.product(X.contiguous()) - X * values).norm(dim=0)
    relative = residuals / values.abs()
    claimed = answer.residuals
    return Judged(
        error=eigenvalue_error(matrix, values, request),
        residual=float(relative.max()),
        claimed=math.nan if claimed is None else float((claimed / values.abs()).max()),
        converged=None if answer.converged is None else int(answer.converged.sum()),
        claims=claimed is not None or answer.converged is not None,
        false=tuple(false_claims(matrix, answer, residuals, request)),
    )


def eigenvalue_error(matrix: Matrix, values: Tensor, request: Request) -> float:
    """The largest relative error; the i-th value is compared with the i-th eigenvalue.

    So that a copy too many is an error, as is one too few.
    """
    exact = matrix.largest(request.k, request.which)
    if len(values) < request.k:
        return math.inf
    found = values.double().sort(descending=True).values
    return float(((found - exact) / exact).abs().max())


def false_claims(
    matrix: Matrix, answer: Answer, residuals: Tensor, request: Request
) -> Iterator[str]:
    """Statements of a solver that are not so, by more than `SLACK` and rounding error."""
    rounding = _ROUNDING * matrix.norm
    values = answer.eigenvalues.double()
    if answer.residuals is not None:
        i, excess = _worst(residuals, SLACK * answer.residuals + rounding)
        if excess > 1:
            true, claimed = float(residuals[i]), float(answer.residuals[i])
            yield f"a residual of {true:.0e} is claimed to be {claimed:.0e}"
    if answer.bounds is not None:
        distances = (values[:, None] - matrix.eigenvalues).abs().min(1).values
        i, excess = _worst(distances, SLACK * answer.bounds + rounding)
        if excess > 1:
            true, claimed = float(distances[i]), float(answer.bounds[i])
            yield f"the next eigenvalue is {true:.0e} away, not {claimed:.0e}"
    if answer.converged is None or not bool(answer.converged.any()):
        return
    called = answer.converged
    allowed = SLACK * request.tol * values.abs() + rounding
    if bool((residuals > allowed)[called].any()):
        yield "a pair called converged is not"
    missing = int(called.sum()) - distinct(matrix.eigenvalues, values[called], allowed[called])
    if missing:
        yield f"{missing} of the values called converged are copies, or no eigenvalues"
    elif bool(called.all()):
        error = eigenvalue_error(matrix, values, request)
        if error > SLACK * request.tol + rounding / float(values.abs().min()):
            yield "all called converged, but some of the largest eigenvalues are missing"


def _worst(true: Tensor, allowed: Tensor) -> tuple[int, float]:
    """Where the truth exceeds what is allowed by the largest factor, and that factor."""
    ratios = true / allowed
    return int(ratios.argmax()), float(ratios.max())


def distinct(eigenvalues: Tensor, values: Tensor, allowed: Tensor) -> int:
    """How many of the values are eigenvalues, where each eigenvalue counts for one value."""
    exact = eigenvalues.sort().values.tolist()
    order = values.argsort()
    pairs = zip(values[order].tolist(), allowed[order].tolist(), strict=True)
    matched = i = 0
    for value, width in pairs:
        while i < len(exact) and exact[i] < value - width:
            i += 1
        if i < len(exact) and exact[i] <= value + width:
            matched += 1
            i += 1
    return matched


# At equal products


def error_within(
    matrix: Matrix, candidate: Candidate, request: Request, budget: int, seeds: int
) -> float:
    """The median eigenvalue error of answers that took at most ``budget`` products.

    Solvers without a budget are run with several tolerances, of which the best counts. NaN if
    there is no answer.
    """
    request = replace(request, which=candidate.which, budget=budget, tol=1e-14)
    tolerances = (request.tol,) if candidate.exact_budget else TOLERANCES
    errors = []
    for seed in range(seeds):
        found = [
            _error_of_run(matrix, candidate, replace(request, seed=seed, tol=tol), budget)
            for tol in tolerances
        ]
        errors.append(min((e for e in found if not math.isnan(e)), default=math.nan))
    return math.nan if any(map(math.isnan, errors)) else statistics.median(errors)


def _error_of_run(matrix: Matrix, candidate: Candidate, request: Request, budget: int) -> float:
    try:
        answer, A, _ = run(matrix, candidate, request)
    except Exception:  # no answer
        return math.nan
    return (
        eigenvalue_error(matrix, answer.eigenvalues, request) if A.columns <= budget else math.nan
    )
