"""Traces at equal products: the true errors, and how often they are within two standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from eigen_measures import silence
from eigen_peers import as_lambda, as_pyhessian, in_double_precision
from solver_problems import Counted, Matrix

from torchlinop.algorithms.trace import trace


@dataclass(frozen=True)
class Found:
    """An estimate; NaN where no standard error comes with it."""

    estimate: float
    stderr: float = math.nan


Estimator = Callable[[Counted, int, int], Found]  # of A, products, seed


@dataclass(frozen=True)
class TraceRow:
    """All seeds of one estimator."""

    error: float = math.nan  # root mean square, relative to Σ |λ|
    coverage: float = math.nan  # the fraction of errors within two standard errors
    columns: float = math.nan  # products that were taken, on average
    failure: str = ""


def ours(method: str) -> Estimator:
    def estimate(A: Counted, num_matvecs: int, seed: int) -> Found:
        found = trace(A.ours(), num_matvecs, method=method, seed=seed)  # type: ignore[arg-type]
        return Found(found.estimate, found.stderr)

    return estimate


def theirs(method: str) -> Estimator:
    def estimate(A: Counted, num_matvecs: int, seed: int) -> Found:
        from hessian_eigenthings.algorithms.trace import trace as of_hessian_eigenthings

        found = of_hessian_eigenthings(
            as_lambda(A),
            num_matvecs=num_matvecs,
            method=method,  # type: ignore[arg-type]
            seed=seed,
        )
        return Found(found.estimate, found.stderr)

    return estimate


def by_curvlinops(name: str) -> Estimator:
    def estimate(A: Counted, num_matvecs: int, seed: int) -> Found:
        import curvlinops

        with in_double_precision(seed):
            return Found(float(getattr(curvlinops, name)(A, num_matvecs)))

    return estimate


def by_pyhessian(tol: float) -> Estimator:
    """``tol=0`` spends all products; 1e-3 is its default, after which it stops."""

    def estimate(A: Counted, num_matvecs: int, seed: int) -> Found:
        with in_double_precision(seed):
            samples = as_pyhessian(A).trace(maxIter=num_matvecs, tol=tol)
        return Found(sum(samples) / len(samples))

    return estimate


HE, CL = "hessian-eigenthings", "curvlinops"
ESTIMATORS: dict[str, Estimator] = {
    "torchlinop hutchinson": ours("hutchinson"),
    "torchlinop hutch++": ours("hutch++"),
    "torchlinop xtrace": ours("xtrace"),
    "torchlinop xnystrace": ours("xnystrace"),
    f"{HE} hutchinson": theirs("hutchinson"),
    f"{HE} hutch++": theirs("hutch++"),
    f"{CL} hutchinson": by_curvlinops("hutchinson_trace"),
    f"{CL} hutch++": by_curvlinops("hutchpp_trace"),
    f"{CL} xtrace": by_curvlinops("xtrace"),
    "PyHessian, all products": by_pyhessian(0.0),
    "PyHessian, default tol": by_pyhessian(1e-3),
}


def measure(matrix: Matrix, estimator: Estimator, num_matvecs: int, seeds: int) -> TraceRow:
    exact, scale = float(matrix.eigenvalues.sum()), float(matrix.eigenvalues.abs().sum())
    errors, covered, columns = [], [], []
    for seed in range(seeds):
        A = Counted(matrix)
        try:
            with silence():
                found = estimator(A, num_matvecs, seed)
        except ImportError as error:
            return TraceRow(failure=f"not installed ({error.name})")
        except Exception as error:  # others' failures are rows
            return TraceRow(failure=f"{type(error).__name__}: {str(error).splitlines()[0][:60]}")
        errors.append(found.estimate - exact)
        columns.append(A.columns)
        if not math.isnan(found.stderr):
            covered.append(abs(found.estimate - exact) <= 2 * found.stderr)
    squares = torch.tensor(errors, dtype=torch.float64).square()
    return TraceRow(
        float(squares.mean().sqrt()) / scale,
        sum(covered) / len(covered) if covered else math.nan,
        sum(columns) / len(columns),
    )
