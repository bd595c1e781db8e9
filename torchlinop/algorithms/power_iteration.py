"""v ← A v / ‖A v‖: the eigenpair of largest magnitude; with those found projected out, the next."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchlinop.algorithms.basis import Basis
from torchlinop.algorithms.eigen_request import target_of
from torchlinop.algorithms.eigen_result import EigenResult
from torchlinop.algorithms.krylov_schur import Status, Target
from torchlinop.algorithms.orthogonal import complete, orthonormalize
from torchlinop.algorithms.power_column import Column
from torchlinop.algorithms.probes import checked_seed
from torchlinop.algorithms.products import Products, run_of_products
from torchlinop.algorithms.rayleigh_ritz import Projector, residual_block
from torchlinop.algorithms.ritz_result import Found, History, bytes_of, finished, scaled
from torchlinop.algorithms.sizes import refuse_fractions, refuse_non_numbers
from torchlinop.algorithms.starting_block import starting_block
from torchlinop.algorithms.unit_scale import UnitScale
from torchlinop.errors import OptionError, TorchlinopWarning
from torchlinop.operators.base import CurvatureOperator

_INSIDE = 1e-3  # a start with no more outside of the pairs found gives way to a random one


def power_iteration_one(
    op: CurvatureOperator,
    max_iter: int = 1000,
    *,
    momentum: float = 0.0,
    tol: float | None = None,
    v0: Tensor | EigenResult | None = None,
    seed: int = 0,
    max_seconds: float = math.inf,
    progress: bool = False,
    strict: bool = False,
) -> EigenResult:
    """The eigenpair of largest magnitude, as `deflated_power_iteration` finds the first.

    Example:
        >>> from torchlinop import MatrixOperator
        >>> A = MatrixOperator(torch.diag(torch.tensor([1.0, -3.0, 2.0], dtype=torch.float64)))
        >>> float(power_iteration_one(A).eigenvalues.round(decimals=6))
        -3.0
    """
    return deflated_power_iteration(
        op, 1, max_iter, momentum=momentum, tol=tol, v0=v0, seed=seed, max_seconds=max_seconds,
        progress=progress, strict=strict,
    )  # fmt: skip


def deflated_power_iteration(
    op: CurvatureOperator,
    k: int = 10,
    max_iter: int = 1000,
    *,
    momentum: float = 0.0,
    tol: float | None = None,
    v0: Tensor | EigenResult | None = None,
    seed: int = 0,
    max_seconds: float = math.inf,
    progress: bool = False,
    strict: bool = False,
) -> EigenResult:
    """The k eigenpairs of largest magnitude, one after the other, by power iteration.

    It needs log(1/tol) |λ_i| / (|λ_i| − |λ_{i+1}|) products for pair i: ``lanczos`` takes a
    fraction. Its merit is that it has nothing to go wrong. It takes up to 7k + 4 vectors.

    Momentum β iterates ``v₊ ∝ A v − β v₋`` (De Sa et al., Accelerated stochastic power iteration,
    2018); best is λ₂²/4, of which the number of products becomes the square root, and with
    β > λ₁²/4 it does not converge. Eigenvalues are those of A, and so are the residuals, also
    where pairs were deflated. Ctrl-C returns the pairs found, or, during the first, what it has
    come to, by one more product.

    Every 32 products one goes to the residual of v: if their plane is invariant though v is not,
    as where λ and −λ are both eigenvalues and v cannot settle, the pair is taken from the plane,
    with a warning if the two magnitudes agree. Of such a pair the positive one comes first.

    Args:
        op: a symmetric operator in any floating-point dtype.
        k: how many pairs.
        max_iter: the budget of products of each pair.
        momentum: β, in units of A².
        tol: relative residual; 1e-6 in float64, 1e-4 in float32, two roundoffs of what is coarser.
        v0: starts, a column a pair, or an earlier result; random ones where they are too few.
        seed: of the random part of the start.
        max_seconds: return what there is after this time, the pair under way too.
        progress: show a bar that counts products, on a terminal.
        strict: raise NotConvergedError, which carries the result, in place of a warning.

    Raises:
        OptionError, VectorError: options or v0 do not fit.
        NonFiniteError, SymmetryError: the products are not those of a fixed symmetric matrix.
    """
    target = target_of(op, k, "LM", tol)
    seed = checked_seed(seed)
    refuse_fractions(max_iter=max_iter)
    refuse_non_numbers(momentum=momentum)
    if max_iter < 1:
        raise OptionError(f"expected max_iter to be at least 1, got {max_iter}; take 1000, say")
    if not 0 <= momentum < math.inf:
        raise OptionError(
            f"expected momentum to be at least 0, got {momentum}; take λ² / 4 of the second "
            "largest |λ|, or leave it out"
        )
    starts = starting_block(op, v0, k, seed)
    A = UnitScale(op)
    with run_of_products(A, max_seconds=max_seconds, progress=progress) as products:
        deflation = _Deflation(products, A, starts, target, momentum, max_iter, seed)
        found = scaled(deflation.run(), A.scale)
    return finished(products, found, target, seed=seed, strict=strict)


@dataclass
class _Deflation:
    """Pairs found one by one, each in the complement of those before."""

    products: Products
    A: UnitScale  # what the products are of
    starts: Tensor  # (n, k) orthonormal
    target: Target
    momentum: float
    max_iter: int
    seed: int
    history: History = field(default_factory=list)
    notes: list[TorchlinopWarning] = field(default_factory=list)

    def __post_init__(self) -> None:
        space, k = self.products.operator.space, self.target.k
        self.X, self.AX = (Basis(space, self.starts, k, dtype=None, device=None) for _ in range(2))
        self.projector = Projector(self.products, self.seed)

    def run(self) -> Found:
        """All pairs, or those found before Ctrl-C."""
        norm = torch.zeros((), dtype=torch.float64, device=self.starts.device)
        residuals: list[float] = []
        for i in range(self.target.k):
            column = Column(self.products, self.A, self.X, i, self.target, self.momentum, norm)
            stop: Status = "maxmatvecs"
            try:
                column.iterate(self._start(i), self.max_iter, self.projector)
            except KeyboardInterrupt:
                if not self.products.matvecs:
                    raise
                if i:
                    return self._found(i, "interrupted")
                stop = "interrupted"
                column.multiply()
            norm = column.norm
            self.X.put(i, column.v)
            self.AX.put(i, column.full_product())
            residuals.append(float(column.residual))
            self._note(column, residuals)
            if stop == "interrupted":
                break
            if self.products.late:
                stop = "maxseconds"
                break
        return self._found(len(residuals), stop)

    def _start(self, i: int) -> Tensor:
        """A unit vector in the complement of X, of this start if it has a part there."""
        space, v = self.products.operator.space, self.starts[:, i : i + 1].clone()
        for threshold in (_INSIDE, 0.0):
            self.X.project(v, i)
            R = orthonormalize(space, v, threshold)
        missing = int(R[0, 0].real == 0)
        return complete(self.X, i, v[:, missing:], missing, seed=self.seed, draw=i + 1)

    def _note(self, column: Column, residuals: list[float]) -> None:
        i = len(residuals)
        small = self.projector(self.X.columns(0, i), self.AX.columns(0, i), "LM")
        row = torch.tensor(residuals, dtype=torch.float64)
        self.history.append((self.products.matvecs, small.values, row))
        if column.mirrored:
            upper, lower = (self.A.scale * value for value in column.mirrored)
            self.notes.append(
                TorchlinopWarning(
                    f"{upper:.6g} and {lower:.6g} are both eigenvalues, of one magnitude up to "
                    "their residuals: power iteration does not settle on either, they were told "
                    'apart in the plane it ended in. For both ends take lanczos(op, which="BE")'
                )
            )

    def _found(self, k: int, status: Status) -> Found:
        """A Rayleigh-Ritz step on k pairs, by the products that found them.

        Without it, what is left of one pair in another would be of the size of the residual of
        the largest.
        """
        space = self.products.operator.space
        small = self.projector(self.X.columns(0, k), self.AX.columns(0, k), "LM")
        self.X.rotate(small.Y)
        self.AX.rotate(small.Y)
        X, AX = self.X.columns(0, k), self.AX.columns(0, k)
        _, residuals = residual_block(space, X, AX, small.values, self.projector.norm)
        ritz = self.projector.ritz(small, residuals)
        if bool(self.target.reached(ritz).all()) and k == self.target.k:
            status = "converged"
        elif self.target.exhausted(ritz):
            status = "stagnated"
        beta = f", momentum {self.momentum:g}" if self.momentum else ""
        X = X.mT.clone().mT
        return Found(
            ritz,
            X,
            status,
            "true",
            self.history,
            f"power iteration{beta}",
            basis_size=self.target.k,
            peak_bytes=bytes_of(X, 7 * self.target.k + 4),
            notes=tuple(self.notes),
        )
