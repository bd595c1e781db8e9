"""A solver of cupyx called again until true residuals are relatively small, or found to fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchlinop.adapters.cupy import as_cupy_operator
from torchlinop.algorithms.eigen_result import EigenResult
from torchlinop.algorithms.krylov_schur import Status, Target
from torchlinop.algorithms.products import Products, run_of_products
from torchlinop.algorithms.rayleigh_ritz import Projector
from torchlinop.algorithms.ritz_result import Found, History, bytes_of, finished, named
from torchlinop.algorithms.starting_block import starting_block
from torchlinop.errors import (
    MemoryEstimateError,
    TorchlinopError,
    TorchlinopWarning,
    warn_caller,
)
from torchlinop.operators.base import CurvatureOperator
from torchlinop.space import VectorSpace

# ``(X, tolerance, budget) ↦ X``: k columns from X; without a tolerance, a sweep to learn scales.
Solver = Callable[[Tensor, float | None, int], Tensor]

_SKEW = 1e-2  # of a Gram matrix: less is mended by Rayleigh-Ritz, more may be a copy


class BreakdownError(Exception):
    """A solver gave no orthonormal vectors; carries the products it took."""

    def __init__(self, reason: str, products: Products) -> None:
        super().__init__(reason)
        self.products = products

    def replaced_by(self, ours: EigenResult, method: str) -> EigenResult:
        """Our result in place of the solver's, saying so, with the products of both."""
        note = f"{self}; the pairs are those of {method}"
        warn_caller(note, TorchlinopWarning)
        return dataclasses.replace(
            ours,
            warnings=(note, *ours.warnings),
            matvecs=ours.matvecs + self.products.matvecs,
            matmats=ours.matmats + self.products.matmats,
        )


class _Counted(CurvatureOperator):
    """The matrix in working precision, with products that a run counts."""

    def __init__(self, products: Products) -> None:
        op = products.operator
        super().__init__(VectorSpace(op.size, products.dtype, op.device), description=[repr(op)])
        self.products = products

    def _matmat(self, V: Tensor) -> Tensor:
        return self.products(V)


@dataclass(frozen=True)
class Rounds:
    """A solver with an absolute tolerance, called until true residuals are relatively small."""

    name: str
    target: Target
    budget: int
    least: int  # products a round takes
    basis_size: int
    seed: int

    def run(
        self,
        op: CurvatureOperator,
        solver: Callable[[Any], Solver],
        v0: Tensor | EigenResult | None,
        columns: int,
        *,
        progress: bool,
        strict: bool,
    ) -> EigenResult:
        """The pairs found from a start of so many columns.

        Raises:
            BreakdownError: the solver gave NaN, or vectors that are not orthogonal.
            MemoryEstimateError: memory ran out.
        """
        with (
            run_of_products(op, total=self.budget, progress=progress) as products,
            torch.cuda.device(op.device),
        ):
            solve = solver(as_cupy_operator(_Counted(products)))
            X = starting_block(op, v0, columns, self.seed)
            found = self._found(products, solve, X)
        return finished(products, found, self.target, seed=self.seed, strict=strict)

    def _found(self, products: Products, solve: Solver, X: Tensor) -> Found:
        target, projector = self.target, Projector(products, self.seed)
        history: History = []
        tolerance: float | None = None
        status: Status | None = None
        while status is None:
            X = self._solved(products, solve, X, tolerance)
            ritz, X = projector.pairs(X, products.columns(X), target.which, target.k)
            history.append((products.matvecs, ritz.values, ritz.residuals))
            wanted = max(float(target.bounds(ritz).min()), ritz.floor)
            if target.exhausted(ritz):
                status = named("converged", target, ritz)
            elif self.budget - products.matvecs < self.least:
                status = "maxmatvecs"
            elif tolerance is not None and wanted >= tolerance:
                status = "stagnated"
            tolerance = wanted
        size = bytes_of(X, self.basis_size + 3 * target.k)
        return Found(
            ritz, X, status, "true", history, self.name, self.basis_size, size,
            restarts=len(history) - 1,
        )  # fmt: skip

    def _solved(
        self, products: Products, solve: Solver, X: Tensor, tolerance: float | None
    ) -> Tensor:
        """Nearly orthonormal columns."""
        try:
            X = solve(X, tolerance, self.budget - products.matvecs - self.target.k)
        except TorchlinopError:
            raise
        except MemoryError as error:  # of CuPy's pool, where torch's knows nothing of it
            device = products.operator.device
            raise MemoryEstimateError(
                f"memory on {device} ran out in {self.name} ({error}); call "
                "torch.cuda.empty_cache() first, which leaves to CuPy what torch holds unused, or "
                "take lanczos with basis_device='cpu'"
            ) from error
        except Exception as error:
            if not _of_solver(error):
                raise
            reason = f"{self.name} failed ({type(error).__name__}: {error})"
            raise BreakdownError(reason, products) from error
        gram = products.operator.space.inner(X, X).cpu()
        if not bool(torch.isfinite(gram).all()):
            raise BreakdownError(f"{self.name} gave NaN, as for matrices of low rank", products)
        if float((gram - torch.eye(len(gram))).abs().max()) > _SKEW:
            raise BreakdownError(f"{self.name} gave vectors that are not orthonormal", products)
        return X


def _of_solver(error: Exception) -> bool:
    """Whether it is of CuPy, as those of cuBLAS are, or of its numbers; others are of products.

    Where its Cholesky factor fails, lobpcg multiplies None.
    """
    of_cupy = type(error).__module__.partition(".")[0] in {"cupy", "cupyx", "cupy_backends"}
    return of_cupy or isinstance(error, ArithmeticError | AttributeError | TypeError | ValueError)
