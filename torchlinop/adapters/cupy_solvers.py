"""cupyx's eigsh and lobpcg, asked for relative accuracy and judged by the residuals of their pairs.

Called by themselves, both take an absolute tolerance, do not say whether they met it, and give
NaN where a Krylov space ends early, as it does for matrices of low rank.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor

from torchlinop.adapters.cupy import as_cupy_operator
from torchlinop.adapters.cupy_memory import copy_of_cupy, cupy, cupy_of
from torchlinop.adapters.cupy_rounds import BreakdownError, Rounds, Solver
from torchlinop.algorithms.eigen_request import target_of
from torchlinop.algorithms.eigen_result import EigenResult
from torchlinop.algorithms.krylov_schur import Target
from torchlinop.algorithms.lanczos import lanczos
from torchlinop.algorithms.lobpcg import lobpcg
from torchlinop.errors import OptionError
from torchlinop.operators.base import CurvatureOperator

End = Literal["LM", "LA", "SA"]

_SWEEP = 5  # iterations of lobpcg after which Ritz values have their order of magnitude
_TINY = 1e-300  # cupyx takes a tolerance of zero for its default


def cupy_eigsh(
    op: CurvatureOperator,
    k: int = 10,
    max_iter: int | None = None,
    *,
    which: End = "LM",
    tol: float | None = None,
    seed: int = 0,
    ncv: int | None = None,
    v0: Tensor | EigenResult | None = None,
    progress: bool = False,
    strict: bool = False,
) -> EigenResult:
    """The k eigenpairs at an end of the spectrum by ``cupyx.scipy.sparse.linalg.eigsh``.

    The matrix stays on its device, and its products are shared without a copy. A pair has
    converged when ‖A x − λ x‖ ≤ tol |λ|, as in ``lanczos``, by k products after the fact. A sweep
    of ncv products comes first, to turn ``tol`` into an absolute one. Where eigsh gives NaN, or
    vectors that are not orthogonal, the pairs are those of ``lanczos``, and a warning says so.

    Costs at most ``max_iter`` products (then at least k for lanczos, if need be) and ncv vectors.

    Args:
        op: a symmetric (Hermitian) operator on a CUDA device.
        k: how many pairs, at most n - 3.
        max_iter: the budget of products, 50 ncv unless given.
        which: ``"LM"`` largest |λ|, ``"LA"`` largest, ``"SA"`` smallest.
        tol: relative; 1e-6 in float64, 1e-4 in float32, two roundoffs of what is coarser.
        seed: of the start.
        ncv: vectors in the basis, max(2 k, k + 32) unless given, as in cupyx.
        v0: a start (n,), which is not written to, or an earlier result.
        progress: show a bar that counts products, on a terminal.
        strict: raise NotConvergedError, which carries the result, in place of a warning.

    Raises:
        OptionError, VectorError: options or v0 do not fit, or CuPy or a GPU is missing.
        NonFiniteError, SymmetryError: the products are not those of a fixed symmetric matrix.
        MemoryEstimateError: memory ran out, in torch or in CuPy.
    """
    target = _target(op, k, which, tol, get_args(End))
    n = op.size
    if k > n - 3:
        raise OptionError(
            f"expected k from 1 to n - 3 = {n - 3:,} for eigsh of cupyx, got {k}; take lanczos, "
            "or torch.linalg.eigh(op.to_dense()) for all eigenvalues of a small matrix"
        )
    m = min(max(2 * k, k + 32) if ncv is None else ncv, n - 1)
    if m < k + 2:
        raise OptionError(f"expected ncv to be at least k + 2 = {k + 2}, got {ncv}; leave it out")
    budget = _budget(50 * m if max_iter is None else max_iter, m + k)

    def solver(A: Any) -> Solver:
        def solve(X: Tensor, tolerance: float | None, budget: int) -> Tensor:
            # A restart takes m - k products, and is begun while fewer than maxiter are used.
            maxiter = m if tolerance is None else budget - (m - k) + 1
            start = cupy_of(X.sum(1))  # a new vector: eigsh overwrites it
            eigsh = cupy("cupyx.scipy.sparse.linalg").eigsh
            x = eigsh(A, k, which=which, v0=start, ncv=m, maxiter=maxiter, tol=tolerance or _TINY)[
                1
            ]
            return copy_of_cupy(x, op.device)

        return solve

    rounds = Rounds("eigsh of cupyx", target, budget, least=m + k, basis_size=m, seed=seed)
    try:
        return rounds.run(op, solver, v0, 1, progress=progress, strict=strict)
    except BreakdownError as breakdown:
        ours = lanczos(
            op, k, max(k, budget - breakdown.products.matvecs), which=which, tol=tol, seed=seed,
            v0=v0, progress=progress, strict=strict,
        )  # fmt: skip
        return breakdown.replaced_by(ours, "lanczos")


def cupy_lobpcg(
    op: CurvatureOperator,
    k: int = 10,
    max_iter: int | None = None,
    *,
    which: Literal["LA", "SA"] = "LA",
    preconditioner: CurvatureOperator | None = None,
    tol: float | None = None,
    seed: int = 0,
    v0: Tensor | EigenResult | None = None,
    progress: bool = False,
    strict: bool = False,
) -> EigenResult:
    """The k largest or smallest eigenpairs by ``cupyx.scipy.sparse.linalg.lobpcg``.

    As ``cupy_eigsh`` otherwise: ``tol`` is relative (that of lobpcg is absolute, and n 3e-8 unless
    given), residuals are true, and where lobpcg fails the pairs are those of our ``lobpcg``.

    Args:
        op: a symmetric (Hermitian) operator on a CUDA device.
        k: how many pairs, which is the block.
        max_iter: the budget of products, 200 k unless given.
        which: ``"LA"`` largest, ``"SA"`` smallest.
        preconditioner: M, about (A − σ I)⁻¹ for a σ beyond the end wanted, on the same space.
        tol: relative; 1e-6 in float64, 1e-4 in float32, two roundoffs of what is coarser.
        seed: of the start.
        v0: a start (n,) or (n, b) with b up to k, which is not written to, or an earlier result.
        progress: show a bar that counts products, on a terminal.
        strict: raise NotConvergedError, which carries the result, in place of a warning.

    Raises:
        OptionError, VectorError: options or v0 do not fit, or CuPy or a GPU is missing.
        NonFiniteError, SymmetryError: the products are not those of a fixed symmetric matrix.
        MemoryEstimateError: memory ran out, in torch or in CuPy.
    """
    target = _target(op, k, which, tol, ("LA", "SA"))
    # For small n, lobpcg of cupyx multiplies the identity and takes the dense way.
    least = k + max(2 * k, op.size if op.size < 5 * k else 0)
    budget = _budget(200 * k if max_iter is None else max_iter, least)

    def solver(A: Any) -> Solver:
        M = preconditioner and as_cupy_operator(preconditioner)

        def solve(X: Tensor, tolerance: float | None, budget: int) -> Tensor:
            # One block for the start, and one an iteration, of which there are maxiter + 1.
            maxiter = budget // k - 2
            options = (
                {"tol": _TINY, "maxiter": min(_SWEEP, maxiter)}
                if tolerance is None
                else {"tol": tolerance, "maxiter": maxiter}
            )
            run = cupy("cupyx.scipy.sparse.linalg").lobpcg
            x = run(A, cupy_of(X), M=M, largest=which == "LA", **options)[1]
            return copy_of_cupy(x, op.device)

        return solve

    rounds = Rounds("lobpcg of cupyx", target, budget, least, basis_size=3 * k, seed=seed)
    try:
        return rounds.run(op, solver, v0, k, progress=progress, strict=strict)
    except BreakdownError as breakdown:
        ours = lobpcg(
            op, k, max(4 * k + 2, budget - breakdown.products.matvecs), which=which,
            preconditioner=preconditioner, tol=tol, seed=seed, v0=v0, progress=progress,
            strict=strict,
        )  # fmt: skip
        return breakdown.replaced_by(ours, "lobpcg of torchlinop")


def _target(
    op: CurvatureOperator, k: int, which: Any, tol: float | None, ends: tuple[str, ...]
) -> Target:
    if which not in ends:
        raise OptionError(
            f"unknown which {which!r} for cupyx; choose one of {', '.join(ends)}, or take lanczos"
        )
    return target_of(op, k, which, tol)


def _budget(max_iter: int, least: int) -> int:
    if max_iter < least:
        raise OptionError(
            "expected max_iter, the budget of products, to be at least "
            f"{least}, for one round of the solver, got {max_iter}; take {20 * least}, say"
        )
    return max_iter
