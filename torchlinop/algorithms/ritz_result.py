"""Ritz pairs of a block method as an EigenResult: error bounds, warnings, and how they came."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlinop.algorithms.basis import inner
from torchlinop.algorithms.eigen_result import EigenResult
from torchlinop.algorithms.krylov_schur import Ritz, Status, Target, Which
from torchlinop.algorithms.orthogonal import real_dtype
from torchlinop.algorithms.products import Products, breakdown, roundoff
from torchlinop.algorithms.rayleigh_ritz import Projector, RayleighRitz
from torchlinop.errors import (
    NotConvergedError,
    NotConvergedWarning,
    OptionError,
    TorchlinopWarning,
    warn_caller,
)
from torchlinop.operators.base import CurvatureOperator

History = list[tuple[int, Tensor, Tensor]]  # matvecs, values, residuals


@dataclass(frozen=True)
class Found:
    """What a solver found, and by which means."""

    ritz: Ritz  # of which the first k pairs are those of X
    X: Tensor  # (n, k) orthonormal
    status: Status
    kind: str
    history: History
    method: str
    basis_size: int
    peak_vectors: int
    restarts: int = 0
    warnings: tuple[str, ...] = ()
    advice: str = "Raise max_iter, or restart from v0=result."


def target_of(op: CurvatureOperator, k: int, which: Which, tol: float | None) -> Target:
    """The pairs asked for, or what is wrong with asking.

    Raises:
        OptionError: no such k, which or tol.
    """
    if not 1 <= k <= op.size:
        raise OptionError(
            f"expected k from 1 to n = {op.size:,}, got {k}; for all eigenvalues of a small matrix "
            "take torch.linalg.eigh(op.to_dense())"
        )
    if tol is not None and not 0 <= tol < 1:
        raise OptionError(f"expected tol from 0 to 1, relative to |λ|, got {tol}; leave it out")
    eps = torch.finfo(op.dtype).eps
    usual = max(1e-6 if eps < 1e-12 else 1e-4, eps)
    return Target(k, which, usual if tol is None else tol, roundoff(op.dtype), breakdown(op.dtype))


def ritz_of(small: RayleighRitz, residuals: Tensor, projector: Projector) -> Ritz:
    """The leading pairs, as many as there are residuals."""
    b = len(residuals)
    nothing = small.vectors[:0]
    return Ritz(
        small.values[:b], small.vectors, residuals, nothing, projector.norm, projector.floor
    )


def named(status: Status, target: Target, ritz: Ritz) -> Status:
    """The status, unless rounding alone stands between the pairs and the accuracy asked for."""
    if status not in ("converged", "exact"):
        return status
    return status if bool(target.reached(ritz).all()) else "stagnated"


def eigen_result(
    products: Products, found: Found, target: Target, *, seed: int, started: float
) -> EigenResult:
    """The k pairs with all that is known about them."""
    op, X, ritz, k = products.operator, found.X, found.ritz, target.k
    values = ritz.values[:k]
    residuals = ritz.residuals[:k].clamp_min(ritz.floor)
    gram = inner(op.space, X, X).cpu()
    close = (values[:, None] - values).abs() <= (residuals[:, None] + residuals)
    return EigenResult(
        eigenvalues=values.to(device=X.device, dtype=real_dtype(X)),
        eigenvectors=X,
        residual_norms=residuals.to(X.device),
        error_bounds=_error_bounds(ritz, residuals).to(X.device),
        converged=target.reached(ritz).to(X.device),
        residual_kind=found.kind,
        status=found.status,
        method=found.method,
        which=target.which,
        tol=target.tol,
        seed=seed,
        matvecs=products.matvecs,
        matmats=products.matmats,
        restarts=found.restarts,
        basis_size=found.basis_size,
        basis_dtype=X.dtype,
        dtype=op.dtype,
        orthogonality_loss=float((gram - torch.eye(k)).abs().max()),
        possible_multiplicity=bool(close.fill_diagonal_(False).any()),
        peak_bytes=found.peak_vectors * op.size * X.element_size(),
        seconds=time.perf_counter() - started,
        history_matvecs=torch.tensor([matvecs for matvecs, _, _ in found.history]),
        history_eigenvalues=_table([values for _, values, _ in found.history], k),
        history_residuals=_table([residuals for _, _, residuals in found.history], k),
        layout=op.layout,
        warnings=found.warnings + _unconverged(products, found, target),
    )


def complain(result: EigenResult, *, strict: bool) -> None:
    """Give the warnings of a result; ``strict`` raises if not all pairs have converged."""
    unconverged = int(not bool(result.converged.all()))  # whether the last warning says so
    if strict and unconverged:
        raise NotConvergedError(result.warnings[-1], result)
    others = len(result.warnings) - unconverged
    for i, message in enumerate(result.warnings):
        warn_caller(message, TorchlinopWarning if i < others else NotConvergedWarning)


def _error_bounds(ritz: Ritz, residuals: Tensor) -> Tensor:
    """``min(r, r² / gap)``; r alone where nothing is known of the values after those wanted."""
    k = len(residuals)
    if len(ritz.values) == k:
        return residuals
    distances = (ritz.values[:k, None] - ritz.values).abs()
    distances[torch.arange(k), torch.arange(k)] = math.inf
    # Where both are zero, as for the zero matrix, there is no gap to divide by.
    by_gap = residuals**2 / distances.min(1).values.clamp_min(torch.finfo(torch.float64).tiny)
    return torch.minimum(residuals, by_gap).clamp_min(ritz.floor)


def _table(rows: list[Tensor], k: int) -> Tensor:
    table = torch.full((len(rows), k), math.nan, dtype=torch.float64)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table


_STAGNATED = "That is the rounding or noise of the products: take a larger tol, or a wider dtype."


def _unconverged(products: Products, found: Found, target: Target) -> tuple[str, ...]:
    reached = target.reached(found.ritz)
    if bool(reached.all()):
        return ()
    residuals = found.ritz.residuals[: target.k].clamp_min(found.ritz.floor)
    worst = int((residuals / target.bounds(found.ritz)).argmax())
    return (
        f"{int(reached.sum())} of {target.k} pairs reached tol={target.tol:g} after "
        f"{products.matvecs} matvecs; worst residual {float(residuals[worst]):.0e} "
        f"(pair {worst + 1}). {_STAGNATED if found.status == 'stagnated' else found.advice}",
    )
