"""The k eigenpairs at an end of the spectrum, by products alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchlinop.algorithms.basis import Basis, inner, small_dtype
from torchlinop.algorithms.eigen_request import AUTO, Plan, Request
from torchlinop.algorithms.eigen_result import EigenResult
from torchlinop.algorithms.krylov_schur import (
    KrylovDecomposition,
    Limits,
    Ritz,
    Run,
    Status,
    Target,
    Which,
    order_of,
)
from torchlinop.algorithms.orthogonal import orthonormalize, random_block, real_dtype
from torchlinop.algorithms.products import Products, run_of_products
from torchlinop.algorithms.reorthogonalization import Reorthogonalization, name_of
from torchlinop.algorithms.starting_block import starting_block
from torchlinop.algorithms.tridiagonal import Recurrence
from torchlinop.errors import (
    NotConvergedError,
    NotConvergedWarning,
    OrthogonalityWarning,
    VectorError,
    warn_caller,
)
from torchlinop.operators.base import CurvatureOperator

Callback = Callable[[int, Tensor, Tensor], object]

# A block of four saves sequential calls, and takes more products: between 1.5 and 4 times as many
# steps' worth. It pays if it costs no more than one and a half single products.
_AUTO_COST = 1.5


def lanczos(
    op: CurvatureOperator,
    k: int = 10,
    max_iter: int | None = None,
    *,
    which: Which = "LM",
    tol: float | None = None,
    seed: int = 0,
    reorthogonalize: Reorthogonalization = True,
    ncv: int | None = None,
    block_size: int | Literal["auto"] | None = None,
    v0: Tensor | EigenResult | None = None,
    verify: bool = False,
    basis_dtype: torch.dtype | None = None,
    basis_device: torch.device | str | None = None,
    max_seconds: float = math.inf,
    progress: bool = False,
    callback: Callback | None = None,
    strict: bool = False,
) -> EigenResult:
    """The k eigenpairs of A at an end of its spectrum, by thick-restart block Lanczos.

    A pair has converged when ‖A x − λ x‖ ≤ tol |λ| (or tol ε^(2/3) ‖A‖, for smaller |λ|). A
    residual is never reported below two roundoffs of ‖A‖. One block finds at most ``block_size``
    copies of a multiple eigenvalue before rounding brings in more: take a block as large as the
    multiplicity expected, or a small tol, to count copies.

    Costs at most ``max_iter`` products, in calls of ``block_size`` columns, and
    ``ncv + block_size`` stored vectors; the basis is read twice a step. The host waits for the
    device O(1) times a restart. Ctrl-C returns what there is.

    Args:
        op: a symmetric (Hermitian) operator in any floating-point dtype. Vectors are in float32
            at least, projected matrices in float64.
        k: how many pairs.
        max_iter: the budget of products, 50 ncv unless given.
        which: ``"LM"`` largest |λ|, ``"LA"`` largest, ``"SA"`` smallest, ``"BE"`` half from
            either end, with the odd one from the upper.
        tol: relative; 1e-6 in float64, 1e-4 in float32, a roundoff of what is coarser.
        seed: of the start and of what replaces vectors at a breakdown.
        reorthogonalize: True or ``"full"``; ``"partial"``, ``"local"``, ``"none"`` or False take
            ``max_iter`` steps (6 k unless given) without restart, see ``lanczos_tridiagonal``.
        ncv: vectors in the basis, max(2k + 1, 20) unless given; fewer where memory is short.
        block_size: columns a product, 1 unless given (or those of v0). ``"auto"`` times a block
            of four against single products, so that results may differ between machines.
        v0: a start (n,), a block (n, b), or an earlier result, of a similar operator say.
        verify: spend k more products on true residuals.
        basis_dtype: store the basis in ``torch.bfloat16`` or ``torch.float16`` (more accurate: it
            holds √n v), with a Rayleigh-Ritz step by k products at the end.
        basis_device: store the basis there, ``"cpu"`` say.
        max_seconds: return what there is after this time.
        progress: show a bar that counts products, on a terminal.
        callback: told ``(matvecs, eigenvalues, residual_norms)`` whenever they are known.
        strict: raise NotConvergedError, which carries the result, in place of a warning.

    Raises:
        OptionError, VectorError: k, ncv, max_iter, tol, which, block_size, v0 do not fit.
        MemoryEstimateError: the basis does not fit into the memory that is free.
        NonFiniteError, SymmetryError: the products are not those of a fixed symmetric matrix.

    Example:
        >>> from torchlinop import MatrixOperator
        >>> A = MatrixOperator(torch.diag(torch.arange(1.0, 101.0, dtype=torch.float64)))
        >>> eigenvalues, eigenvectors = lanczos(A, k=3, which="LA")
        >>> eigenvalues.round(decimals=6)
        tensor([100.,  99.,  98.], dtype=torch.float64)
    """
    started = time.perf_counter()
    request = Request(
        op, k, max_iter, which, tol, name_of(reorthogonalize), ncv, block_size, max_seconds, verify,
        basis_dtype, basis_device,
    )  # fmt: skip
    request.refuse()
    with run_of_products(
        op, total=max_iter, max_seconds=max_seconds, progress=progress
    ) as products:
        b = _block_size(products, block_size, v0, seed)
        target = request.target()
        plan = request.plan(b)
        start = _start(op, v0, b, seed)
        if request.unrestarted:
            outcome = _unrestarted(products, start, plan.ncv, request.mode, target)
        else:
            limits = Limits(plan.products, callback)
            decomposition = _decomposition(products, start, plan, seed)
            outcome = _restarted(Run(decomposition, target, limits))
        if plan.clean_up and outcome.status != "interrupted":
            outcome = _cleaned_up(products, outcome, target)
    result = _result(request, products, outcome, target, plan, seed=seed, started=started)
    _complain(result, strict)
    return result


@dataclass(frozen=True)
class Outcome:
    """What a solver found, before it is dressed as a result."""

    ritz: Ritz  # of which the first len(X.T) pairs have eigenvectors
    eigenvectors: Tensor  # (n, k)
    status: Status
    kind: str
    history: list[tuple[int, Tensor, Tensor]]
    restarts: int


def _block_size(
    products: Products, wanted: int | str | None, v0: Tensor | EigenResult | None, seed: int
) -> int:
    n = products.operator.size
    if wanted == "auto":
        return min(n, AUTO) if _block_pays(products, seed) else 1
    if isinstance(wanted, int):
        return min(n, wanted)
    return v0.shape[1] if isinstance(v0, Tensor) and v0.ndim == 2 else 1


def _block_pays(products: Products, seed: int) -> bool:
    """Whether four columns at once cost little more than one: measured, by six products."""
    V = random_block(products.operator.space, AUTO, seed, 0)
    single, block = min(_seconds(products, V[:, :1]) for _ in range(2)), _seconds(products, V)
    return block <= _AUTO_COST * single


def _seconds(products: Products, V: Tensor) -> float:
    started = time.perf_counter()
    float(products.columns(V)[0, 0].real)  # waits for the device
    return time.perf_counter() - started


def _start(op: CurvatureOperator, v0: Tensor | EigenResult | None, b: int, seed: int) -> Tensor:
    """Orthonormal columns (n, b) from v0; k eigenvectors are added up into b columns."""
    if isinstance(v0, EigenResult):
        X = v0.eigenvectors
        v0 = torch.stack([X[:, i::b].sum(1) for i in range(min(b, X.shape[1]))], dim=1)
    if v0 is not None and v0.ndim == 2 and v0.shape[1] > b:
        raise VectorError(
            f"expected v0 to have at most block_size = {b} columns, got {v0.shape[1]}; "
            "leave out block_size"
        )
    return starting_block(op, v0, b, seed)


def _decomposition(products: Products, start: Tensor, plan: Plan, seed: int) -> KrylovDecomposition:
    capacity = plan.ncv + plan.block_size
    dtype, device = plan.basis_dtype, plan.basis_device
    basis = Basis(products.operator.space, start, capacity, dtype=dtype, device=device)
    return KrylovDecomposition(products, basis, start, plan.ncv, seed)


def _restarted(run: Run) -> Outcome:
    ritz, status = run.solve()
    X = run.decomposition.basis.combine(ritz.vectors[:, : run.target.k])
    return Outcome(ritz, X, status, "recurrence", run.history, run.restarts)


def _unrestarted(
    products: Products, start: Tensor, steps: int, mode: str, target: Target
) -> Outcome:
    """Ritz pairs of a plain Lanczos run, copies left out where the mode makes copies."""
    recurrence = Recurrence(products, start, steps, mode, keep_basis=True)
    recurrence.run()
    T = recurrence.result()
    values, Y = torch.linalg.eigh(T.matrix())
    norm = float(values.abs().max())
    chosen = order_of(values, target.which)
    if mode in ("local", "none"):
        chosen = _distinct(values, chosen, 20 * target.zero * norm)
    X = recurrence.basis.combine(Y[:, chosen[: target.k]].to(small_dtype(start.dtype)))
    lengths = recurrence.space.norm(X)
    X = X.div_(lengths)
    residuals = T.residual_norm * Y[-1, chosen].abs()
    residuals[: target.k] /= lengths.double().cpu()  # of a basis that is not orthonormal
    ritz = Ritz(
        values[chosen], Y[:, chosen], residuals, Y[-1:, chosen], norm, 2 * target.eps * norm
    )
    everywhere = len(chosen) >= target.k and bool(target.reached(ritz).all())
    status: Status = "converged" if everywhere else "maxmatvecs"
    history = [(products.matvecs, ritz.values[: target.k], ritz.residuals[: target.k])]
    return Outcome(ritz, X, status, "recurrence", history, 0)


def _distinct(values: Tensor, order: Tensor, distance: float) -> Tensor:
    """The order without values as near as ``distance`` to an earlier one."""
    chosen: list[int] = []
    for i in order.tolist():
        if not chosen or float((values[chosen] - values[i]).abs().min()) > distance:
            chosen.append(i)
    return torch.tensor(chosen)


def _cleaned_up(products: Products, found: Outcome, target: Target) -> Outcome:
    """Rayleigh-Ritz on the eigenvectors found, by k products, with true residuals."""
    space, X = products.operator.space, found.eigenvectors
    orthonormalize(space, X, 0.0)
    AX = products.columns(X)
    H = inner(space, X, AX).cpu()
    values, Y = torch.linalg.eigh((H + H.mH) / 2)
    order = order_of(values, target.which)
    values, Y = values[order], Y[:, order]
    small = Y.to(device=X.device, dtype=X.dtype)
    X, AX = X @ small, AX @ small
    AX -= X * values.to(device=X.device, dtype=X.dtype)
    residuals = space.norm(AX).double().cpu()
    norm = max(found.ritz.norm, float(values.abs().max()))
    floor = 2 * target.eps * norm
    ritz = Ritz(values, Y, residuals, found.ritz.coupling[:0], norm, floor)
    status = found.status
    if status in ("converged", "exact") and not bool(target.reached(ritz).all()):
        status = "stagnated"
    return Outcome(ritz, X, status, "true", found.history, found.restarts)


def _result(
    request: Request,
    products: Products,
    found: Outcome,
    target: Target,
    plan: Plan,
    *,
    seed: int,
    started: float,
) -> EigenResult:
    op, mode = request.op, request.mode
    X = found.eigenvectors
    k = X.shape[1]
    values = found.ritz.values[:k]
    residuals = found.ritz.residuals[:k].clamp_min(found.ritz.floor)
    # Where both are zero, as for the zero matrix, there is no gap to divide by.
    gaps = _gaps(found.ritz.values, k).clamp_min(torch.finfo(torch.float64).tiny)
    by_gap = residuals**2 / gaps
    order = torch.argsort(values, descending=True) if target.which == "BE" else torch.arange(k)
    gram = inner(op.space, X, X).cpu()
    rounding = target.zero * found.ritz.norm
    close = (values[:, None] - values).abs() <= residuals[:, None] + residuals + rounding

    def placed(t: Tensor) -> Tensor:
        return t[order].to(X.device)

    blocks = f", blocks of {plan.block_size}" if plan.block_size > 1 else ""
    restarting = f"thick-restart Lanczos{blocks}"
    return EigenResult(
        eigenvalues=placed(values.to(real_dtype(X))),
        eigenvectors=X[:, order.to(X.device)] if target.which == "BE" else X,
        residual_norms=placed(residuals),
        error_bounds=placed(torch.minimum(residuals, by_gap).clamp_min(found.ritz.floor)),
        converged=placed(target.reached(found.ritz)[:k]),
        residual_kind=found.kind,
        status=found.status,
        method=restarting if mode == "full" else f"Lanczos, {mode} reorthogonalization",
        which=target.which,
        tol=target.tol,
        seed=seed,
        matvecs=products.matvecs,
        matmats=products.matmats,
        restarts=found.restarts,
        basis_size=plan.ncv,
        basis_dtype=plan.basis_dtype,
        dtype=op.dtype,
        orthogonality_loss=float((gram - torch.eye(k)).abs().max()),
        possible_multiplicity=bool(close.fill_diagonal_(False).any()),
        peak_bytes=plan.bytes,
        seconds=time.perf_counter() - started,
        history_matvecs=torch.tensor([matvecs for matvecs, _, _ in found.history]),
        history_eigenvalues=_padded([values for _, values, _ in found.history], target.k),
        history_residuals=_padded([residuals for _, _, residuals in found.history], target.k),
        layout=op.layout,
        warnings=tuple(_warnings(found, target, products, plan, mode)),
    )


def _gaps(values: Tensor, k: int) -> Tensor:
    """The distance of each of the first k Ritz values to the next one, (k,); inf if alone."""
    distances = (values[:k, None] - values).abs()
    distances[torch.arange(k), torch.arange(k)] = math.inf
    return distances.min(1).values


def _padded(rows: list[Tensor], k: int) -> Tensor:
    table = torch.full((len(rows), k), math.nan, dtype=torch.float64)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table


def _warnings(
    found: Outcome, target: Target, products: Products, plan: Plan, mode: str
) -> list[str]:
    warnings = []
    if mode in ("local", "none"):
        warnings.append(
            f"reorthogonalize={mode!r}: converged eigenvalues came in copies, of which one each "
            'is kept; multiplicities are unknown. Take "full", which restarts to save memory'
        )
    reached = target.reached(found.ritz)
    if len(reached) == target.k and bool(reached.all()):
        return warnings
    residuals = found.ritz.residuals[: target.k].clamp_min(found.ritz.floor)
    worst = int((residuals / target.bounds(found.ritz)).argmax())
    advice = (
        "That is the rounding or noise of the products: take a larger tol, or a wider dtype."
        if found.status == "stagnated"
        else f"Raise max_iter or ncv (now {plan.ncv}), or restart from v0=result."
    )
    warnings.append(
        f"{int(reached.sum())} of {target.k} pairs reached tol={target.tol:g} after "
        f"{products.matvecs} matvecs; worst residual {float(residuals[worst]):.0e} "
        f"(pair {worst + 1}). {advice}"
    )
    return warnings


def _complain(result: EigenResult, strict: bool) -> None:
    for message in result.warnings:
        unconverged = "pairs reached" in message
        if unconverged and strict:
            raise NotConvergedError(message, result)
        warn_caller(message, NotConvergedWarning if unconverged else OrthogonalityWarning)
