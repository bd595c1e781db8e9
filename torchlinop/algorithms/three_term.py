"""``A v_j = β_{j-1} v_{j-1} + α_j v_j + β_j v_{j+1}`` for all columns of a block, in three blocks.

No basis is stored and no vector orthogonalised against earlier ones than the last two. Ritz values
then come in copies ("ghosts") whose weights add up to that of one: the quadrature they define is
as accurate as with orthogonal vectors (Greenbaum 1989; Knizhnerman 1996).
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinop.algorithms.products import Products


class ThreeTermRecurrence:
    """Lanczos' recurrence from every column of V (n, k) at once; columns of norm one, or zero."""

    def __init__(self, A: Products, V: Tensor) -> None:
        self.A = A
        self._V = V
        self._previous = torch.zeros_like(V)
        self._alphas: list[Tensor] = []
        self._betas = [torch.zeros(V.shape[1], dtype=torch.float64, device=V.device)]
        self._scale = torch.zeros((), dtype=torch.float64, device=V.device)  # a bound below ‖A‖

    def advance(self) -> Tensor:
        """The Lanczos vectors v_j (n, k), after finding α_j and β_j by one product.

        A column whose Krylov space is exhausted goes on as zero.
        """
        A, V = self.A, self._V
        W = A(V)
        W.addcmul_(self._previous, self._betas[-1].to(W.dtype), value=-1)
        alpha = A.dots(V, W)
        W.addcmul_(V, alpha.to(W.dtype), value=-1)
        beta = A.norms(W)
        self._scale = torch.maximum(self._scale, (alpha.abs() + beta).max())
        # An invariant subspace is found when β is rounding: dividing by it would give a random
        # vector the weight of a direction. ``~(≤)`` lets NaN go on, to be found at the end.
        alive = ~(beta <= A.noise * self._scale)
        beta = beta.where(alive, 0.0)
        W.mul_(torch.where(alive, 1 / beta, 0.0).to(W.dtype))
        self._previous, self._V = V, W
        self._betas.append(beta)
        self._alphas.append(alpha)
        return V

    @property
    def steps(self) -> int:
        """How many were taken."""
        return len(self._alphas)

    def tridiagonals(self) -> list[Tridiagonal]:
        """The matrix T of every column, on the CPU. Waits for the device.

        Raises:
            NonFiniteError: a product was NaN or infinite.
        """
        alphas = torch.stack(self._alphas).cpu()
        betas = torch.stack(self._betas[1 : self.steps + 1]).cpu()
        self.A.refuse_non_finite(alphas, betas)
        return [Tridiagonal(a, b) for a, b in zip(alphas.mT, betas.mT, strict=True)]


class Tridiagonal:
    """The eigendecomposition of T (m, m), m the number of steps before β is zero."""

    def __init__(self, alphas: Tensor, betas: Tensor) -> None:
        self.taken = len(alphas)
        zeros = (betas == 0).nonzero()
        self.exhausted = len(zeros) > 0  # the Krylov space is invariant: nodes are eigenvalues
        self.steps = int(zeros[0]) + 1 if self.exhausted else len(alphas)
        self.alphas, self.betas = alphas, betas = alphas[: self.steps], betas[: self.steps]
        T = torch.diag(alphas) + torch.diag(betas[:-1], 1) + torch.diag(betas[:-1], -1)
        self.nodes, self.Y = torch.linalg.eigh(T)  # (m,) ascending, (m, m)
        self.residuals = (betas[-1] * self.Y[-1]).abs()  # (m,) ‖A x − θ x‖ of the Ritz pairs

    @property
    def weights(self) -> Tensor:
        """``(e₁ᵀ y_i)²``, the weights of the Gauss quadrature, (m,)."""
        squares: Tensor = self.Y[0] ** 2
        return squares

    def leading(self, steps: int) -> Tridiagonal:
        """That of the first steps alone."""
        return Tridiagonal(self.alphas[:steps], self.betas[:steps])
