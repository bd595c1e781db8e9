"""The k eigenpairs at an end of the spectrum, by products alone."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from numbers import Integral
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from torchlinop.algorithms.basis import Basis
from torchlinop.algorithms.clean_up import cleaned_up
from torchlinop.algorithms.eigen_request import AUTO, Plan, Request
from torchlinop.algorithms.eigen_result import EigenResult
from torchlinop.algorithms.krylov_schur import KrylovDecomposition, Limits, Run, Status, Which
from torchlinop.algorithms.orthogonal import random_block
from torchlinop.algorithms.plain_lanczos import plain_lanczos
from torchlinop.algorithms.probes import checked_seed
from torchlinop.algorithms.products import Products, run_of_products
from torchlinop.algorithms.reorthogonalization import Reorthogonalization, name_of
from torchlinop.algorithms.ritz_result import Found, finished
from torchlinop.algorithms.run_file import RunFile
from torchlinop.algorithms.starting_block import refuse_no_start, starting_block
from torchlinop.algorithms.symmetric_run import symmetric_run
from torchlinop.errors import OptionError, VectorError
from torchlinop.operators.base import CurvatureOperator

log = logging.getLogger("torchlinop")

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
    checkpoint: str | Path | None = None,
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
    ``ncv + block_size`` stored vectors; the basis is read twice a step. Where A seems not to be
    symmetric, six products more tell. The host waits for the device O(1) times a restart. Ctrl-C
    returns what there is.

    Args:
        op: a symmetric (Hermitian) operator in any floating-point dtype. Vectors are in float32
            at least, projected matrices in float64.
        k: how many pairs.
        max_iter: the budget of products, 50 ncv unless given.
        which: ``"LM"`` largest |λ|, ``"LA"`` largest, ``"SA"`` smallest, ``"BE"`` half from
            either end, with the odd one from the upper.
        tol: relative; 1e-6 in float64, 1e-4 in float32, two roundoffs of what is coarser.
        seed: of the start and of what replaces vectors at a breakdown.
        reorthogonalize: True or ``"full"``; ``"partial"``, ``"local"``, ``"none"`` or False take
            ``max_iter`` steps (6 k unless given) without restart, see ``lanczos_tridiagonal``.
        ncv: vectors in the basis, max(2k + 1, 20, k + 6 block_size) unless given; fewer where
            memory is short.
        block_size: columns a product, 1 unless given (or those of v0). ``"auto"`` times a block
            of four against single products, so that results may differ between machines.
        v0: a start (n,), a block (n, b), or an earlier result, of a similar operator say: its
            eigenvectors are added up, into ``block_size`` columns. Along training that saves a
            sixth of the products at tol=1e-6 and a third to a half at 1e-2; at 1e-2 and coarser,
            and k up to 5, ``v0=result.eigenvectors``, a block of k, saves half, in a sixth of the
            calls and less, but at a small tol it may take several times as many as a random start.
        verify: spend k more products on true residuals.
        basis_dtype: store the basis in ``torch.bfloat16`` or ``torch.float16`` (more accurate: it
            holds √n v), with a Rayleigh-Ritz step by k products at the end. Residuals stay at a
            fifth of its ε times ‖A‖; errors of eigenvalues are of the order of its square.
        basis_device: store the basis there, ``"cpu"`` say.
        max_seconds: return what there is after this time, fewer than k pairs if need be, as
            after Ctrl-C; true residuals are not taken then.
        checkpoint: a safetensors file, written at every restart, at the end, at Ctrl-C and where
            a budget is spent. If it is there, the run goes on from it: on the same machine, bit by
            bit as without a stop. That takes one product more, not counted, to see that the matrix
            is the same; v0 is ignored. ``max_iter``, of all calls together, and ``max_seconds``,
            of each, may be others than before. A file of a run that is over gives its result.
            Where vectors are on several ranks, it is a folder, for any number of ranks to go on
            from.
        progress: show a bar that counts products, on a terminal.
        callback: told ``(matvecs, eigenvalues, residual_norms)`` whenever they are known.
        strict: raise NotConvergedError, which carries the result, in place of a warning.

    Raises:
        OptionError, VectorError: k, ncv, max_iter, tol, which, block_size, seed, v0 do not fit; the
            checkpoint is of other options, or of another matrix.
        MemoryEstimateError: the basis does not fit into the memory that is free.
        NonFiniteError, SymmetryError: the products are not those of a fixed symmetric matrix.

    Example:
        >>> from torchlinop import MatrixOperator
        >>> A = MatrixOperator(torch.diag(torch.arange(1.0, 101.0, dtype=torch.float64)))
        >>> eigenvalues, eigenvectors = lanczos(A, k=3, which="LA")
        >>> eigenvalues.round(decimals=6)
        tensor([100.,  99.,  98.], dtype=torch.float64)
    """
    if isinstance(block_size, Integral) and not isinstance(block_size, bool):  # NumPy's too
        block_size = int(block_size)
    request = Request(
        op, k, max_iter, which, tol, name_of(reorthogonalize), ncv, block_size, verify,
        basis_dtype, basis_device,
    )  # fmt: skip
    request.refuse()
    refuse_no_start(v0)
    if not (callback is None or callable(callback)):
        raise OptionError(
            f"expected callback to be a function of three arguments, got {callback!r}; leave it out"
        )
    seed = checked_seed(seed)
    file = RunFile(checkpoint, request, seed)
    request = file.as_begun(request)
    target = request.target()
    # Restarts see in T whether A is symmetric; a recurrence takes it for granted.
    run = symmetric_run if request.unrestarted else run_of_products
    with run(op, total=max_iter, max_seconds=max_seconds, progress=progress) as products:
        plan = request.plan(_block_size(products, request.block_size, v0, seed))
        log.info("lanczos by %s", plan)
        start = _start(op, None if file.saved else v0, plan.block_size, seed)
        if request.unrestarted:
            found = plain_lanczos(
                products, start, plan.ncv, request.mode, target, peak_bytes=plan.bytes
            )
            if callback:
                callback(*found.history[-1])
        else:
            limits = Limits(plan.products, callback)
            found = _restarted(products, start, request, plan, limits, file=file, seed=seed)
        if plan.clean_up:
            found = cleaned_up(products, found, target, seed)
    return finished(products, found, target, seed=seed, strict=strict)


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
    return not products.operator.space.agree(block > _AUTO_COST * single)


def _seconds(products: Products, V: Tensor) -> float:
    started = time.perf_counter()
    products.columns(V)[:1].cpu()  # waits for the device
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


def _restarted(
    products: Products, start: Tensor, request: Request, plan: Plan, limits: Limits, *,
    file: RunFile, seed: int,
) -> Found:  # fmt: skip
    """The pairs by thick restarts, a basis of ``plan.ncv`` vectors."""
    target, b = request.target(), plan.block_size
    dtype, device = plan.basis_dtype, plan.basis_device
    basis = Basis(products.operator.space, start, plan.ncv + b, dtype=dtype, device=device)
    run = Run(KrylovDecomposition(products, basis, start, plan.ncv, seed), target, limits)
    file.resume(run)
    ritz, status = run.solve()
    return Found(
        ritz,
        basis.combine(ritz.vectors[:, : target.k]),
        status,
        "recurrence",
        run.history,
        "thick-restart Lanczos" + (f", blocks of {b}" if b > 1 else ""),
        basis_size=plan.ncv,
        peak_bytes=plan.bytes,
        restarts=run.restarts,
        unsettled=run.unsettled,
        basis_dtype=dtype,
        advice=_advice(request, plan),
    )


def _advice(request: Request, plan: Plan) -> dict[Status, str]:
    more = f"Raise max_iter or ncv (now {plan.ncv}), or restart from v0=result."
    if not request.coarse:
        return {"maxmatvecs": more}
    # The root mean square of the relative rounding errors of entries.
    rounding = torch.finfo(plan.basis_dtype).eps / 5
    return {
        "maxmatvecs": more,
        "stagnated": f"That is the rounding of the basis, stored in {plan.basis_dtype}, about "
        f"{rounding:.0e} of ‖A‖, or the noise of the products: take a larger tol, or leave out "
        "basis_dtype.",
    }
