"""X ← the Ritz vectors of span[X, P, M (A X − X Θ)], where P is how X came from the X before."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from torchlinop.algorithms.conjugate_blocks import Blocks
from torchlinop.algorithms.eigen_request import target_of
from torchlinop.algorithms.eigen_result import EigenResult
from torchlinop.algorithms.given_operator import refuse_no_operator
from torchlinop.algorithms.krylov_schur import Limits, Ritz, Status, Target
from torchlinop.algorithms.probes import checked_seed
from torchlinop.algorithms.products import run_of_products
from torchlinop.algorithms.ritz_result import Found, History, bytes_of, finished, named
from torchlinop.algorithms.sizes import given, refuse_fractions
from torchlinop.algorithms.starting_block import refuse_no_start, starting_block
from torchlinop.errors import OptionError, VectorError
from torchlinop.operators.base import CurvatureOperator

End = Literal["LA", "SA"]

_PATIENCE = 10  # iterations that do not halve residuals which are next to rounding error
_TINY = torch.finfo(torch.float64).tiny


def lobpcg(
    op: CurvatureOperator,
    k: int = 10,
    max_iter: int | None = None,
    *,
    which: End = "LA",
    preconditioner: CurvatureOperator | None = None,
    guard: int | None = None,
    v0: Tensor | EigenResult | None = None,
    tol: float | None = None,
    seed: int = 0,
    verify: bool = True,
    max_seconds: float = math.inf,
    progress: bool = False,
    strict: bool = False,
) -> EigenResult:
    """The k largest or smallest eigenpairs, by preconditioned conjugate gradients in blocks.

    Locally optimal block preconditioned conjugate gradients (Knyazev, SIAM J. Sci. Comput. 23,
    2001), with orthonormal [X, P, W] (Hetmaniuk and Lehoucq, J. Comput. Phys. 218, 2006; Duersch
    et al., SIAM J. Sci. Comput. 40, 2018). For where a preconditioner is known, as the inverse of
    K-FAC for the smallest eigenvalues, and for starts that are close, as along training; without
    either, ``lanczos`` takes fewer products.

    X has k + guard columns. Guard vectors are the next best seen from the same span. They take no
    products, and keep what would be forgotten: without them, up to a third more products, and more
    where others follow closely on those wanted. A pair has converged when
    ‖A x − λ x‖ ≤ tol |λ| (or tol ε^(2/3) ‖A‖, for smaller |λ|), and takes no further products
    unless that changes.

    Costs at most ``max_iter`` products, k in a call, and 10 (k + guard) vectors.
    The host waits for the device twice an iteration. Ctrl-C returns what there is.

    Args:
        op: a symmetric (Hermitian) operator in any floating-point dtype.
        k: how many pairs.
        max_iter: the budget of products, 200 (k + guard) unless given.
        which: ``"LA"`` largest, ``"SA"`` smallest.
        preconditioner: M, about (A − σ I)⁻¹ for a σ beyond the end wanted. An operator on the
            same space, ``KFACOperator(...).inverse(damping)`` say.
        guard: columns beside those wanted, max(2, k // 2) unless given.
        v0: a start (n,), a block (n, b) with b up to k + guard, or an earlier result. Up to k
            columns are made k, by random ones.
        tol: relative; 1e-6 in float64, 1e-4 in float32, two roundoffs of what is coarser.
        seed: of the random part of the start.
        verify: judge convergence by k further products, if the budget leaves as many, and not by
            the recurrence of A X; ``residual_kind`` says which.
        max_seconds: return what there is after this time.
        progress: show a bar that counts products, on a terminal.
        strict: raise NotConvergedError, which carries the result, in place of a warning.

    Raises:
        OptionError, VectorError: options, v0 or the preconditioner do not fit.
        NonFiniteError, SymmetryError: the products are not those of a fixed symmetric matrix.

    Example:
        >>> from torchlinop import MatrixOperator
        >>> A = MatrixOperator(torch.diag(torch.arange(1.0, 101.0, dtype=torch.float64)))
        >>> eigenvalues, eigenvectors = lobpcg(A, k=2, which="SA")
        >>> eigenvalues.round(decimals=6)
        tensor([1., 2.], dtype=torch.float64)
    """
    refuse_fractions(**given(max_iter=max_iter, guard=guard))
    target = target_of(op, k, _checked(which), tol)
    refuse_no_start(v0)
    seed = checked_seed(seed)
    guard = max(2, k // 2) if guard is None else guard
    most = min(op.size, k + guard)
    columns = min(most, max(k, _columns(v0)))
    budget = 200 * most if max_iter is None else max_iter
    _refuse(op, preconditioner, guard, budget, columns)
    with run_of_products(op, total=budget, max_seconds=max_seconds, progress=progress) as products:
        X = starting_block(op, v0, columns, seed)
        blocks = Blocks(products, preconditioner, X, most, seed)
        found = Iteration(blocks, target, Limits(budget), verify).run()
    return finished(products, found, target, seed=seed, strict=strict)


@dataclass
class Iteration:
    """When to go on, when to look closer, when to stop."""

    blocks: Blocks
    target: Target
    limits: Limits
    verify: bool
    history: History = field(default_factory=list)
    best: float = math.inf  # the worst residual over what it has to be below, at its best
    waited: int = 0  # iterations since it was halved
    claimed: float = math.inf  # the same by true residuals, when convergence was last claimed
    refreshed: int = 0
    verified: bool = False

    def run(self) -> Found:
        """Iterate until the pairs are accurate, rounding has the last word, or a limit is met."""
        while True:
            ritz = self.blocks.rayleigh_ritz(self.target.which)
            k = self.target.k
            matvecs = self.blocks.products.matvecs
            self.history.append((matvecs, ritz.values[:k], ritz.residuals[:k]))
            stop: Status | None = None
            if self.target.exhausted(ritz):
                ritz, stop = self._judged(ritz)
            stop = stop or self._stagnated(ritz) or self._expanded(ritz)
            if stop:
                return self._found(ritz, stop)

    def _judged(self, ritz: Ritz) -> tuple[Ritz, Status | None]:
        """Whether true residuals are as small as the recurrence has it."""
        if not self.verify or self.limits.exceeded(self.blocks.products, self.target.k):
            return ritz, "converged"
        self.refreshed += 1
        try:
            ritz = self.blocks.refresh(ritz, self.target.k, self.target.which)
        except KeyboardInterrupt:
            return ritz, "interrupted"
        before, self.claimed = self.claimed, self._worst(ritz)
        self.verified = self.target.exhausted(ritz)
        if self.verified:
            return ritz, "converged"
        return ritz, "stagnated" if self.claimed > before / 2 else None

    def _stagnated(self, ritz: Ritz) -> Status | None:
        """Whether residuals next to rounding error have stopped falling."""
        worst = self._worst(ritz)
        if worst <= self.best / 2:
            self.best, self.waited = worst, 0
        residuals = ritz.residuals[: self.target.k]
        if bool((residuals <= self.target.zero * ritz.norm).all()):
            self.waited += 1
        return "stagnated" if self.waited > _PATIENCE else None

    def _expanded(self, ritz: Ritz) -> Status | None:
        """Go on with the columns that are not accurate yet, unless a limit is in the way."""
        products = self.blocks.products
        exceeded = self.limits.exceeded(products, 1)
        if exceeded:
            return exceeded
        active = (~self.target.reached(ritz)).nonzero()[:, 0]
        try:
            self.blocks.expand(active[: self.limits.max_matvecs - products.matvecs])
        except KeyboardInterrupt:
            return "interrupted"
        return None

    def _worst(self, ritz: Ritz) -> float:
        # Where both are zero, as for the zero matrix, nothing is left to wait for.
        bounds = self.target.bounds(ritz).clamp_min(_TINY)
        return float((ritz.residuals[: self.target.k] / bounds).max())

    def _found(self, ritz: Ritz, status: Status) -> Found:
        most = self.blocks.most
        X = self.blocks.S.columns(0, self.target.k).mT.clone().mT
        return Found(
            ritz,
            X,
            named(status, self.target, ritz),
            "true" if self.verified else "recurrence",
            self.history,
            f"LOBPCG, blocks of {most}",
            basis_size=3 * most,
            peak_bytes=bytes_of(X, 10 * most),
            restarts=max(0, self.refreshed - 1),
        )


def _columns(v0: Tensor | EigenResult | None) -> int:
    """How many columns a start has, if it has columns."""
    if isinstance(v0, Tensor):
        return v0.shape[1] if v0.ndim == 2 else 1
    return 0 if v0 is None else len(v0)


def _checked(which: End) -> End:
    if not isinstance(which, str) or which not in get_args(End):
        raise OptionError(
            f'unknown which {which!r}; choose "LA" or "SA", or take lanczos for other ends'
        )
    return which


def _refuse(
    op: CurvatureOperator, M: CurvatureOperator | None, guard: int, budget: int, least: int
) -> None:
    if guard < 0:
        raise OptionError(f"expected guard to be at least 0, got {guard}; leave it out")
    if budget < least:
        raise OptionError(
            f"expected max_iter, the budget of products, to be at least {least}, one for every "
            f"column of the block, got {budget}; take {20 * least}, say"
        )
    if M is None:
        return
    refuse_no_operator(M, "preconditioner")
    if M.space != op.space:
        raise VectorError(
            f"expected a preconditioner on the space of the operator, got {M!r} for {op!r}; "
            "build both from the same parameters, dtype and device"
        )
