"""A V = V T + Q S: expand by blocks, restart with the wanted Ritz vectors in place of V."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from torchlinop.algorithms.basis import Basis, small_dtype
from torchlinop.algorithms.orthogonal import IN_SPAN, complete, orthonormalize, removed
from torchlinop.algorithms.products import Products, breakdown, roundoff
from torchlinop.errors import NonFiniteError

Which = Literal["LM", "LA", "SA", "BE"]
Loss = Literal["none", "some", "all"]  # of the columns of a block, to their breakdown
Status = Literal[
    "converged", "exact", "stagnated", "maxmatvecs", "maxseconds", "interrupted"
]  # fmt: skip

_CHECK_PRODUCTS = 6  # of operator.check()


@dataclass(frozen=True)
class Ritz:
    """The eigenpairs of T, in the order wanted, with the norms ``‖S y‖`` of their residuals."""

    values: Tensor  # (j,) float64, on the CPU, as is all here
    vectors: Tensor  # (j, j)
    residuals: Tensor  # (j,)
    coupling: Tensor  # (w, j) S Y
    norm: float  # the largest |θ|, an estimate of ‖A‖ from below
    floor: float  # what rounding and noise make of a residual, however small its recurrence


def order_of(values: Tensor, which: Which) -> Tensor:
    """The order in which eigenvalues are wanted."""
    if which == "LM":
        return torch.argsort(values.abs(), descending=True, stable=True)
    order = torch.argsort(values, descending=which != "SA", stable=True)
    if which != "BE":
        return order
    both = torch.stack([order, order.flip(0)], dim=1).flatten()  # largest, smallest, ...
    return both[: len(order)]


class KrylovDecomposition:
    """``A V = V T + Q S`` with orthonormal [V, Q]; V has ``size`` columns, Q ``width``.

    Stewart, A Krylov-Schur algorithm for large eigenproblems, SIMAX 23 (2002); for symmetric
    matrices this is thick-restart Lanczos (Wu and Simon, SIMAX 22, 2000), in blocks (Zhou and
    Saad, Numerical Algorithms 47, 2008).
    """

    def __init__(
        self, products: Products, basis: Basis, start: Tensor, capacity: int, seed: int
    ) -> None:
        self.block_size = start.shape[1]
        operator = products.operator
        working, stored = (torch.finfo(t.dtype).eps for t in (start, basis.rows))
        self.products, self.basis, self.seed = products, basis, seed
        self.capacity = capacity
        self.eps, self.breakdown = roundoff(operator.dtype), breakdown(operator.dtype)
        self.T = torch.zeros(
            (self._rows(), self._rows()), dtype=small_dtype(start.dtype), device=start.device
        )
        self.scale = torch.zeros((), dtype=torch.float64, device=start.device)  # below ‖A‖
        self.kept = self.draws = 0
        self.broken = False  # whether the Krylov space of the start was invariant
        # A coupling this far from its transpose, relative to ‖A‖, is worth a closer look.
        self.suspicious = max(1000 * working, 20 * self.eps, 4 * stored)
        self.symmetric = False  # as far as measured, whatever the noise
        self._nothing = start[:, :0]
        self._continue(0, self._nothing, start)

    def _rows(self) -> int:
        return self.capacity + self.block_size

    @property
    def width(self) -> int:
        return self.block.shape[1]

    def _continue(self, size: int, previous: Tensor, Q: Tensor) -> None:
        # One statement, so that an interruption finds all of it, or nothing.
        self.size, self.previous, self.block = size, previous, self.basis.put(size, Q)

    def expand(self) -> None:
        """Take the product of Q, and make it orthogonal to V and Q. Nothing leaves the device.

        First to the neighbours, where the product has all its components but rounding; then to
        all. So the basis is read twice, not four times, and still "twice is enough" (Parlett
        1980, section 6.9). After a restart the neighbours are all.
        """
        space, T = self.basis.space, self.T
        start, stop = self.size, self.size + self.width
        new, after = slice(start, stop), slice(stop, stop + self.width)
        W = self.products.columns(self.block)
        before = start if start == self.kept else self.previous.shape[1]
        if self.basis.direct:
            T[start - before : stop, new] = self.basis.project(W, stop, start - before)
        else:  # what is stored is not as accurate as the neighbours are
            T[:start, new] = self._removed_before(W, before)
            T[new, new] = removed(space, self.block, W)
        self.scale = torch.maximum(self.scale, torch.linalg.matrix_norm(T[:stop, new]))
        R = orthonormalize(space, W, self.breakdown * self.scale)
        T[:stop, new] += self.basis.project(W, stop) @ R
        T[after, new] = orthonormalize(space, W, IN_SPAN) @ R
        self.scale = torch.maximum(self.scale, torch.linalg.matrix_norm(R))
        self._continue(stop, self.block, W)

    def _removed_before(self, W: Tensor, columns: int) -> Tensor:
        if columns > self.previous.shape[1]:
            return self.basis.project(W, self.size)
        H = removed(self.basis.space, self.previous, W)
        return torch.cat([H.new_zeros(self.size - columns, H.shape[1]), H])

    def observe(self, which: Which, checked: int) -> tuple[Ritz, Loss]:
        """Rayleigh-Ritz on V, and how much of a block after ``checked`` was lost.

        Columns lost are replaced by random ones, and what came after that block is forgotten.
        The one transfer from the device; a second one where columns were lost.

        Raises:
            NonFiniteError, SymmetryError: the products are not those of a symmetric matrix.
        """
        T = self._transferred()
        defect = self._defect(T[: self.size])
        loss: Loss = "none"
        lost = self._first_loss(T, checked)
        if lost is not None:
            loss = self._mend(T, *lost)
            T = self._transferred()
        j = self.size
        values, vectors = torch.linalg.eigh((T[:j] + T[:j].mH) / 2)
        order = order_of(values, which)
        coupling = T[j:] @ vectors[:, order]
        norm = float(values.abs().max())
        floor = max(2 * self.eps * norm, defect if self.basis.direct else 0.0)
        residuals = torch.linalg.vector_norm(coupling, dim=0)
        ritz = Ritz(values[order], vectors[:, order], residuals, coupling, norm, floor)
        return ritz, loss

    def _transferred(self) -> Tensor:
        return self.T[: self.size + self.width, : self.size].to("cpu", copy=True)

    def _defect(self, T: Tensor) -> float:
        """``max |T - T^H|``: rounding and noise of the products, or of no symmetric matrix."""
        if not bool(torch.isfinite(T).all()):
            raise NonFiniteError(
                f"the products of {self.products.operator!r} hold NaN or infinity, by product "
                f"{self.products.matvecs}; look for them in the data and the parameters"
            )
        defect = float((T - T.mH).abs().max())
        suspicious = defect > self.suspicious * float(torch.linalg.matrix_norm(T, 2))
        if suspicious and not self.symmetric:
            self.products.count(_CHECK_PRODUCTS, _CHECK_PRODUCTS)
            self.products.operator.check(seed=self.seed, strict=True)
            self.symmetric = True
        return defect

    def _first_loss(self, T: Tensor, checked: int) -> tuple[int, int] | None:
        """The columns (start, stop) of V of which the next block is the first with a loss."""
        width = self.width
        lost = T.diagonal(-width).real == 0 if width else torch.zeros(0)
        for start in range(checked, self.size, width):
            if bool(lost[start : start + width].any()):
                return start, start + width
        return None

    def _mend(self, T: Tensor, start: int, stop: int) -> Loss:
        width, room = stop - start, self.basis.rows.shape[1] - stop
        rows = torch.arange(stop, stop + width)
        alive = rows[T[rows, rows - width].real > 0][:room]
        Q = torch.cat([self.basis.columns(i, i + 1) for i in alive.tolist()] or [self._nothing], 1)
        self.T[:, stop:] = 0
        self.T[stop:] = 0
        self.T[stop : stop + len(alive), :stop] = T[alive, :stop].to(self.T)
        self.draws += 1
        self.broken = True
        missing = min(self.block_size, room) - len(alive)
        Q = complete(self.basis, stop, Q, missing, seed=self.seed, draw=self.draws)
        self._continue(stop, self.basis.columns(start, stop), Q)
        return "some" if len(alive) else "all"

    def restart(self, ritz: Ritz, keep: int) -> None:
        """``V ← V Y`` for the first ``keep`` Ritz vectors; T becomes diagonal but for S."""
        width = self.width
        Y = ritz.vectors[:, :keep]
        block = self.block.mT.clone().mT  # the buffer is about to be overwritten
        self.basis.rotate(Y)
        self.T.zero_()
        self.T[:keep, :keep] = torch.diag(ritz.values[:keep]).to(self.T)
        self.T[keep : keep + width, :keep] = ritz.coupling[:, :keep].to(self.T)
        self.kept = keep
        self._continue(keep, self._nothing, block)


@dataclass(frozen=True)
class Target:
    """Which eigenpairs, and how accurate."""

    k: int
    which: Which
    tol: float
    eps: float  # roundoff of the products
    zero: float  # what is zero as far as can be told, relative to ‖A‖

    def bounds(self, ritz: Ritz) -> Tensor:
        """What the residuals have to be below: tol |θ|, or of ‖A‖ where θ is next to nothing."""
        theta = ritz.values[: self.k].abs()
        relative = self.tol * theta.clamp_min(self.eps ** (2 / 3) * ritz.norm)
        return torch.where(theta <= self.zero * ritz.norm, relative.clamp_min(ritz.floor), relative)

    def reached(self, ritz: Ritz) -> Tensor:
        """Which of the first k pairs are as accurate as wanted: (min(k, j),) bool."""
        return ritz.residuals[: self.k].clamp_min(ritz.floor) <= self.bounds(ritz)

    def exhausted(self, ritz: Ritz) -> bool:
        """Whether no further product makes any of k pairs better."""
        residuals = ritz.residuals[: self.k]
        within = residuals <= self.bounds(ritz).clamp_min(ritz.floor)
        return len(residuals) == self.k and bool(within.all())


@dataclass
class Limits:
    """When to stop though nothing has converged, and whom to tell how it goes."""

    max_matvecs: int
    callback: Callable[[int, Tensor, Tensor], object] | None = None

    def exceeded(self, products: Products, columns: int) -> Status | None:
        if products.matvecs + columns > self.max_matvecs:
            return "maxmatvecs"
        if products.late:
            return "maxseconds"
        return None


@dataclass
class Run:
    """One run of the solver: where it stands, and how it got there."""

    decomposition: KrylovDecomposition
    target: Target
    limits: Limits
    history: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    restarts: int = 0

    def solve(self) -> tuple[Ritz, Status]:
        """Expand and restart until the pairs are accurate, or a limit is exceeded."""
        V = self.decomposition
        before: Tensor | None = None  # the values wanted at the last breakdown
        exploring = False  # random columns whose Krylov space has not been seen yet
        while True:
            checked = V.size
            stop = self._expand_to(self._next_check())
            ritz, loss = self._observe(checked)
            wanted = ritz.values[: self.target.k]
            if V.width == 0:
                return ritz, self._named("exact", ritz)
            if loss == "all":  # V is an invariant subspace
                if self._unchanged(ritz, before):
                    return ritz, self._named("exact", ritz)
                before = wanted if len(wanted) == self.target.k else None
            exploring |= loss != "none"
            full = V.size + V.width > V.capacity
            if (full or not exploring) and self.target.exhausted(ritz):
                return ritz, self._named("converged", ritz)
            if stop:
                return ritz, stop
            if full:
                V.restart(ritz, self._keep())
                self.restarts += 1
                exploring = V.broken = False

    def _named(self, status: Status, ritz: Ritz) -> Status:
        return status if bool(self.target.reached(ritz).all()) else "stagnated"

    def _expand_to(self, size: int) -> Status | None:
        """Expand until V has ``size`` columns, unless a limit is in the way."""
        V = self.decomposition
        while V.size < size:
            exceeded = self.limits.exceeded(V.products, V.width)
            if exceeded:
                return exceeded
            try:
                V.expand()
            except KeyboardInterrupt:
                if not V.size:
                    raise
                return "interrupted"
        return None

    def _next_check(self) -> int:
        """The size of V at which to look next: O(log m) times first, then twice a restart.

        At every step, once the Krylov space was found to be invariant.
        """
        V = self.decomposition
        last = V.size + (V.capacity - V.size) // V.width * V.width
        if V.broken or V.size == 0:
            return V.size + V.width
        if self.restarts == 0:
            return min(2 * V.size, last)
        half = V.kept + (last - V.kept) // (2 * V.width) * V.width
        return half if V.size < half else last

    def _keep(self) -> int:
        """How many Ritz vectors to keep: k and half of the rest, so that blocks fill V again."""
        V, k = self.decomposition, self.target.k
        room = V.capacity - k
        return V.capacity - max(1, (room - room // 2) // V.width) * V.width

    def _unchanged(self, ritz: Ritz, before: Tensor | None) -> bool:
        """Whether the values wanted are those at the last breakdown: no copy was missing."""
        if before is None:
            return False
        change = (ritz.values[: self.target.k] - before).abs().max()
        return bool(change <= self.target.zero * ritz.norm)

    def _observe(self, checked: int) -> tuple[Ritz, Loss]:
        ritz, loss = self.decomposition.observe(self.target.which, checked)
        k = self.target.k
        matvecs = self.decomposition.products.matvecs
        self.history.append((matvecs, ritz.values[:k], ritz.residuals[:k]))
        if self.limits.callback:
            self.limits.callback(*self.history[-1])
        return ritz, loss
