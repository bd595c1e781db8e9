"""X ← the Ritz vectors of span[X, P, M (A X − X Θ)], where P is how X came from the X before."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from torchlinop.algorithms.basis import Basis
from torchlinop.algorithms.eigen_request import target_of
from torchlinop.algorithms.eigen_result import EigenResult
from torchlinop.algorithms.krylov_schur import Limits, Ritz, Status, Target, Which
from torchlinop.algorithms.orthogonal import IN_SPAN, orthonormalize, real_dtype
from torchlinop.algorithms.probes import checked_seed
from torchlinop.algorithms.products import Products, run_of_products
from torchlinop.algorithms.rayleigh_ritz import Projector, RayleighRitz, residual_block
from torchlinop.algorithms.ritz_result import Found, History, bytes_of, finished, named
from torchlinop.algorithms.sizes import refuse_fractions
from torchlinop.algorithms.starting_block import starting_block
from torchlinop.errors import NonFiniteError, OptionError, VectorError
from torchlinop.operators.base import CurvatureOperator

End = Literal["LA", "SA"]

_PATIENCE = 10  # iterations that do not halve residuals which are next to rounding error
_PARALLEL = 1e-8  # directions in coefficients that differ by less are one
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

    The block has k + guard columns. Guard vectors are iterated on but not waited for: the pace is
    set by the gap behind them. A pair has converged when ‖A x − λ x‖ ≤ tol |λ| (or
    tol ε^(2/3) ‖A‖, for smaller |λ|), and takes no further products unless that changes.

    Costs at most ``max_iter`` products, at most k + guard in a call, and 10 (k + guard) vectors.
    The host waits for the device twice an iteration. Ctrl-C returns what there is.

    Args:
        op: a symmetric (Hermitian) operator in any floating-point dtype.
        k: how many pairs.
        max_iter: the budget of products, 200 (k + guard) unless given.
        which: ``"LA"`` largest, ``"SA"`` smallest.
        preconditioner: M, about (A − σ I)⁻¹ for a σ beyond the end wanted. An operator on the
            same space, ``KFACOperator(...).inverse(damping)`` say.
        guard: columns beside those wanted, max(2, k // 2) unless given.
        v0: a start (n,), a block (n, b) with b up to k + guard, or an earlier result.
        tol: relative; 1e-6 in float64, 1e-4 in float32, two roundoffs of what is coarser.
        seed: of the random part of the start.
        verify: judge convergence by k further products, not by the recurrence of A X.
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
    refuse_fractions(max_iter=max_iter, guard=guard)
    target = target_of(op, k, _checked(which), tol)
    seed = checked_seed(seed)
    guard = max(2, k // 2) if guard is None else guard
    b = min(op.size, k + guard)
    budget = 200 * b if max_iter is None else max_iter
    _refuse(op, preconditioner, guard, budget, b + k * verify)
    with run_of_products(op, total=budget, max_seconds=max_seconds, progress=progress) as products:
        blocks = Blocks(products, preconditioner, starting_block(op, v0, b, seed), seed)
        limits = Limits(budget - k * verify)
        found = Iteration(blocks, target, limits, verify).run()
    return finished(products, found, target, seed=seed, strict=strict)


class Blocks:
    """Orthonormal columns [X, P, W] (or zero), and their products with A."""

    def __init__(
        self, products: Products, M: CurvatureOperator | None, X: Tensor, seed: int
    ) -> None:
        self.products, self.M = products, M
        self.space = products.operator.space
        self.b = self.size = X.shape[1]
        self.S, self.AS = (
            Basis(self.space, X, 3 * self.b, dtype=None, device=None) for _ in range(2)
        )
        self.S.put(0, X)
        self.AS.put(0, products.columns(X))
        self.projector = Projector(products, seed)
        self.threshold = 50 * torch.finfo(X.dtype).eps  # of a unit vector: rounding error
        self.R = X[:, :0]  # (A X − X Θ) but for a factor

    def _leading(self, columns: int) -> tuple[Tensor, Tensor]:
        return self.S.columns(0, columns), self.AS.columns(0, columns)

    def rayleigh_ritz(self, which: Which) -> Ritz:
        """X ← the best b Ritz vectors; P ← the part of them that is not in the X before."""
        small = self._projected(which)
        Z = torch.cat([small.Y[:, : self.b], _conjugate(small, self.b)], 1)
        self.S.rotate(Z)
        self.AS.rotate(Z)
        self.size = Z.shape[1]
        return self.projector.ritz(small, self._residuals(small.values[: self.b]))

    def _projected(self, which: Which) -> RayleighRitz:
        try:
            return self.projector(*self._leading(self.size), which)
        except NonFiniteError as error:
            if self.M is None:
                raise
            raise NonFiniteError(f"{error}; or those of the preconditioner, {self.M!r}") from None

    def refresh(self, ritz: Ritz, k: int) -> Ritz:
        """Take the products of the first k Ritz vectors instead of combining those of S."""
        self.AS.put(0, self.products.columns(self.S.columns(0, k)))
        return dataclasses.replace(
            ritz, residuals=self.projector.claimed(self._residuals(ritz.values))
        )

    def _residuals(self, values: Tensor) -> Tensor:
        """The norms (b,) of R, which is made anew."""
        X, AX = self._leading(self.b)
        self.R = X[:, :0]  # the memory is for the new one
        self.R, norms = residual_block(self.space, X, AX, values, self.projector.norm)
        return norms

    def expand(self, active: Tensor) -> None:
        """W ← M R for these columns of R, made orthonormal to [X, P] and in itself, and A W.

        Nothing is read back from the device: columns with no direction of their own become zero.
        """
        W = self.R[:, active.nonzero()[:, 0].to(self.R.device)]
        if self.M is not None:
            W = self.M.matmat(W.to(self.M.dtype)).to(W.dtype)
        lengths = self.space.norm(W)
        W = (W * torch.where(lengths > 0, 1 / lengths, 0.0).to(real_dtype(W))).mT.contiguous().mT
        for threshold in (self.threshold, IN_SPAN):  # "Twice is enough" (Parlett 1980, §6.9)
            self.S.project(W, self.size)
            orthonormalize(self.space, W, threshold)
        AW = self.products.columns(W)
        self.S.put(self.size, W)
        self.AS.put(self.size, AW)
        self.size += W.shape[1]


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
        if not self.verify:
            return ritz, "converged"
        self.refreshed += 1
        try:
            ritz = self.blocks.refresh(ritz, self.target.k)
        except KeyboardInterrupt:
            return ritz, "interrupted"
        before, self.claimed = self.claimed, self._worst(ritz)
        if self.target.exhausted(ritz):
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
        everyone = dataclasses.replace(self.target, k=self.blocks.b)
        active = ~everyone.reached(ritz)
        exceeded = self.limits.exceeded(self.blocks.products, int(active.sum()))
        if exceeded:
            return exceeded
        try:
            self.blocks.expand(active)
        except KeyboardInterrupt:
            return "interrupted"
        return None

    def _worst(self, ritz: Ritz) -> float:
        # Where both are zero, as for the zero matrix, nothing is left to wait for.
        bounds = self.target.bounds(ritz).clamp_min(_TINY)
        return float((ritz.residuals[: self.target.k] / bounds).max())

    def _found(self, ritz: Ritz, status: Status) -> Found:
        b = self.blocks.b
        X = self.blocks.S.columns(0, self.target.k).mT.clone().mT
        return Found(
            ritz,
            X,
            named(status, self.target, ritz),
            "true" if status == "converged" and self.verify else "recurrence",
            self.history,
            f"LOBPCG, blocks of {b}",
            basis_size=3 * b,
            peak_bytes=bytes_of(X, 10 * b),
            restarts=max(0, self.refreshed - 1),
        )


def _conjugate(small: RayleighRitz, b: int) -> Tensor:
    """Coefficients of P: Ritz vectors without their part in X, made orthogonal to Ritz vectors.

    In coordinates of the orthonormal basis S F, X has the first b.
    """
    Y = small.vectors[:, :b]
    C = Y.clone()
    C[:b] = 0
    C = normalize(C, dim=0, eps=_TINY)
    for _ in range(2):
        C = C - Y @ (Y.mH @ C)
    U, sigma, _ = torch.linalg.svd(C, full_matrices=False)
    P: Tensor = small.F @ U[:, sigma > _PARALLEL]
    return P


def _checked(which: End) -> End:
    if which not in get_args(End):
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
    if M is not None and M.space != op.space:
        raise VectorError(
            f"expected a preconditioner on the space of the operator, got {M!r} for {op!r}; "
            "build both from the same parameters, dtype and device"
        )
