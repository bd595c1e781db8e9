"""Ritz pairs of any solver as an EigenResult: error bounds, warnings, and how they came."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from torchlinop.algorithms.eigen_result import EigenResult
from torchlinop.algorithms.krylov_schur import Ritz, Status, Target
from torchlinop.algorithms.orthogonal import real_dtype
from torchlinop.algorithms.products import ROUNDING, Products
from torchlinop.errors import (
    NotConvergedError,
    NotConvergedWarning,
    TorchlinopWarning,
    warn_caller,
)
from torchlinop.model_state import full_precision

History = list[tuple[int, Tensor, Tensor]]  # matvecs, values, residuals

# What to do about pairs that are not accurate, by the reason to stop.
_ADVICE: dict[Status, str] = {
    "stagnated": "That is the rounding or noise of the products: take a larger tol, or a wider "
    "dtype.",
    "maxmatvecs": "Raise max_iter, or restart from v0=result.",
    "maxseconds": "Raise max_seconds, or restart from v0=result.",
    "interrupted": "To go on, restart from v0=result.",
}


@dataclass(frozen=True)
class Found:
    """What a solver found, and by which means."""

    ritz: Ritz  # of which the first j pairs are those of X
    X: Tensor  # (n, j) unit columns, where j is k or, if no more were found, less
    status: Status
    kind: str  # of the residuals: "true" or "recurrence"
    history: History
    method: str
    basis_size: int
    peak_bytes: int
    restarts: int = 0
    unsettled: bool = False  # whether others may be nearer to the end wanted, however accurate X is
    basis_dtype: torch.dtype | None = None  # unless it is that of X
    notes: tuple[TorchlinopWarning, ...] = ()
    advice: Mapping[Status, str] = field(default_factory=dict)  # where it is not the usual


def scaled(found: Found, scale: float) -> Found:
    """The pairs of ``scale A``, as they are if the scale is a power of two."""
    ritz = replace(
        found.ritz,
        values=found.ritz.values * scale,
        residuals=found.ritz.residuals * scale,
        norm=found.ritz.norm * scale,
        floor=found.ritz.floor * scale,
    )
    history = [(matvecs, scale * values, scale * r) for matvecs, values, r in found.history]
    return replace(found, ritz=ritz, history=history)


def finished(
    products: Products, found: Found, target: Target, *, seed: int, strict: bool
) -> EigenResult:
    """The result, after warnings of what is wrong with it.

    Raises:
        NotConvergedError: ``strict``, and some pairs are not as accurate as wanted.
    """
    with full_precision(products.operator.device):
        result = eigen_result(products, found, target, seed=seed)
    unconverged = result.warnings[len(found.notes) :]
    if strict and unconverged:
        raise NotConvergedError(unconverged[0], result)
    for note in found.notes:
        warn_caller(str(note), type(note))
    for message in unconverged:
        warn_caller(message, NotConvergedWarning)
    return result


def eigen_result(products: Products, found: Found, target: Target, *, seed: int) -> EigenResult:
    """The pairs with all that is known about them."""
    op, X, ritz = products.operator, found.X, found.ritz
    k = X.shape[1]
    values = ritz.values[:k]
    residuals = ritz.residuals[:k].clamp_min(ritz.floor)
    gram = op.space.inner(X, X).cpu()
    close = residuals[:, None] + residuals + target.zero * ritz.norm
    equal = ((values[:, None] - values).abs() <= close).fill_diagonal_(False)
    both_ends = target.which == "BE"
    order = torch.argsort(values, descending=True) if both_ends else torch.arange(k)

    def placed(column: Tensor) -> Tensor:
        return column[order].to(X.device)

    return EigenResult(
        eigenvalues=placed(values.to(real_dtype(X))),
        eigenvectors=X[:, order.to(X.device)] if both_ends else X,
        residual_norms=placed(residuals),
        error_bounds=placed(_error_bounds(ritz, residuals, target.eps)),
        converged=placed(target.reached(ritz)[:k] & (not found.unsettled)),
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
        basis_dtype=found.basis_dtype or X.dtype,
        dtype=op.dtype,
        orthogonality_loss=float((gram - torch.eye(k)).abs().max()),
        possible_multiplicity=bool(equal.any()),
        peak_bytes=found.peak_bytes,
        seconds=products.seconds,
        history_matvecs=torch.tensor([matvecs for matvecs, _, _ in found.history]),
        history_eigenvalues=_table([values for _, values, _ in found.history], target.k),
        history_residuals=_table([residuals for _, _, residuals in found.history], target.k),
        layout=op.layout,
        warnings=(*map(str, found.notes), *_unconverged(products, found, target)),
    )


def named(status: Status, target: Target, ritz: Ritz) -> Status:
    """The status, unless rounding alone stands between the pairs and the accuracy asked for."""
    if status not in ("converged", "exact"):
        return status
    return status if bool(target.reached(ritz).all()) else "stagnated"


def bytes_of(X: Tensor, vectors: int) -> int:
    """Those of so many vectors like the columns of X."""
    return vectors * len(X) * X.element_size()


def _error_bounds(ritz: Ritz, residuals: Tensor, eps: float) -> Tensor:
    """``min(r, r² / gap)``; r alone where nothing is known of the values after those wanted."""
    k = len(residuals)
    if len(ritz.values) == k:
        return residuals
    # To the other eigenvalues: one is as near to its Ritz value as its residual says.
    distances = (ritz.values[:k, None] - ritz.values).abs() - ritz.residuals
    distances[torch.arange(k), torch.arange(k)] = math.inf
    # Where both are zero, as for the zero matrix, there is no gap to divide by.
    by_gap = residuals**2 / distances.min(1).values.clamp_min(torch.finfo(torch.float64).tiny)
    # Values have the rounding of inner products: up to 26 ε ‖A‖ (measured, n <= 100,000), which is
    # in residuals as well, but for 10.
    unit = ROUNDING * eps * ritz.norm
    rounding = ritz.least(k).clamp_min(2 * unit)
    return torch.minimum(residuals, by_gap.clamp_min(6 * unit)).maximum(rounding)


def _table(rows: list[Tensor], k: int) -> Tensor:
    table = torch.full((len(rows), k), math.nan, dtype=torch.float64)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table


def _unconverged(products: Products, found: Found, target: Target) -> tuple[str, ...]:
    if found.unsettled:
        return (
            f"the Krylov space of the start was exhausted, and after {products.matvecs} matvecs "
            "too little had been seen of what is outside: eigenvalues beyond those found may be "
            "missing. " + _ADVICE[found.status],
        )
    reached = target.reached(found.ritz)
    if len(reached) == target.k and bool(reached.all()):
        return ()
    residuals = found.ritz.residuals[: target.k].clamp_min(found.ritz.floor)
    worst = int((residuals / target.bounds(found.ritz)).argmax())
    advice = (_ADVICE | dict(found.advice))[found.status]
    return (
        f"{int(reached.sum())} of {target.k} pairs reached tol={target.tol:g} after "
        f"{products.matvecs} matvecs; worst residual {float(residuals[worst]):.0e} "
        f"(pair {worst + 1}). {advice}",
    )
