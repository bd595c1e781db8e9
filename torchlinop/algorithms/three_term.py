"""``A v_j = β_{j-1} v_{j-1} + α_j v_j + β_j v_{j+1}`` for all columns of a block, in three blocks.

No basis is stored and no vector orthogonalised against earlier ones than the last two. Ritz values
then come in copies ("ghosts") whose weights add up to that of one: the quadrature they define is
as accurate as with orthogonal vectors (Greenbaum 1989; Knizhnerman 1996).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlinop.algorithms.dynamic_range import refuse_range
from torchlinop.algorithms.late_look import LateLook
from torchlinop.algorithms.products import Products
from torchlinop.algorithms.same_matrix import refuse_another_matrix


@dataclass(frozen=True)
class Stage:
    """Where a recurrence is: all that its next step depends on, and the coefficients so far."""

    V: Tensor  # (n, k) the next vectors v_j
    previous: Tensor  # (n, k) v_{j-1}
    scale: Tensor  # () a bound below ‖A‖
    alphas: tuple[Tensor, ...]  # (k,) each, float64
    betas: tuple[Tensor, ...]  # (k,) each, one for every alpha

    def tensors(self) -> dict[str, Tensor]:
        """As real tensors for a file; vectors are rows, as they are in memory."""
        return {
            "V": _real(self.V.mT),
            "previous": _real(self.previous.mT),
            "scale": self.scale,
            "alphas": torch.stack(self.alphas),
            "betas": torch.stack(self.betas),
        }

    @classmethod
    def of_tensors(cls, saved: Mapping[str, Tensor], like: Products) -> Stage:
        """The same again, bit by bit."""
        device, dtype = like.operator.device, like.dtype
        # Cloned, as tensors of a file begin at any byte, which sums by vector units depend on.
        t = {name: tensor.to(device).clone() for name, tensor in saved.items()}
        V, previous = (t[name].view(dtype).flatten(1).mT for name in ("V", "previous"))
        return cls(V, previous, t["scale"], t["alphas"].unbind(), t["betas"].unbind())


class ThreeTermRecurrence:
    """Lanczos' recurrence from every column of V (n, k) at once; columns of norm one, or zero.

    A step replaces its stage at once: whatever interrupts it leaves the stage before.
    """

    def __init__(self, A: Products, start: Tensor | Stage) -> None:
        self.A = A
        self.stage = start if isinstance(start, Stage) else _first_stage(start)
        betas = self.stage.betas[-1:]
        self.exhausted = bool(betas) and not bool(betas[0].any())  # by all columns
        self._resumed = isinstance(start, Stage)
        self._look = LateLook()

    def advance(self) -> Tensor:
        """The Lanczos vectors v_j (n, k), after finding α_j and β_j by one product.

        A column whose Krylov space is exhausted goes on as zero; once all are, which a GPU tells
        a step late, further steps tell nothing.

        Raises:
            OptionError: the stage at which it began is one of another matrix.
        """
        A, s = self.A, self.stage
        W = A.columns(s.V)
        if self._resumed:
            self._refuse_another_matrix(W)
        if s.betas:
            W.addcmul_(s.previous, s.betas[-1].to(W.dtype), value=-1)
        alpha = A.dots(s.V, W)
        W.addcmul_(s.V, alpha.to(W.dtype), value=-1)
        beta = A.norms(W)
        scale = torch.maximum(s.scale, (alpha.abs() + beta).max())
        # An invariant subspace is found when β is rounding: dividing by it would give a random
        # vector the weight of a direction. ``~(≤)`` lets NaN go on, to be found at the end.
        alive = ~(beta <= A.noise * scale)
        beta = beta.where(alive, 0.0)
        W.mul_(torch.where(alive, 1 / beta, 0.0).to(W.dtype))
        self.stage = Stage(W, s.V, scale, (*s.alphas, alpha), (*s.betas, beta))
        self.exhausted = bool(self._look(~alive.any()))
        return s.V

    def _refuse_another_matrix(self, W: Tensor) -> None:
        """Look whether ``⟨v_{j-1}, A v_j⟩ = β_{j-1}``, to rounding, which is divided by β."""
        s, beta = self.stage, self.stage.betas[-1]
        difference = (self.A.dots(s.previous, W) - beta).abs() / s.scale
        seen = difference * beta / (s.scale + beta)
        refuse_another_matrix(self.A, float(seen.max()), self.A.noise)
        self._resumed = False

    @property
    def steps(self) -> int:
        """How many were taken."""
        return len(self.stage.alphas)

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """All α and all β (steps, k), on the CPU. Waits for the device.

        Raises:
            NonFiniteError: a product was NaN or infinite.
            OptionError: squares of numbers as small or large as ‖A‖ vanish or overflow.
        """
        alphas = torch.stack(self.stage.alphas).cpu()
        betas = torch.stack(self.stage.betas).cpu()
        self.A.refuse_non_finite(alphas)
        refuse_range(self.A, float(self.stage.scale))
        self.A.refuse_non_finite(betas)
        return alphas, betas


def _first_stage(V: Tensor) -> Stage:
    V = V.mT.contiguous().mT  # as products come, so that a resumed run has the same strides
    zero = torch.zeros((), dtype=torch.float64, device=V.device)
    return Stage(V, V, zero, (), ())


def _real(rows: Tensor) -> Tensor:
    return torch.view_as_real(rows) if rows.is_complex() else rows


def tridiagonals(coefficients: tuple[Tensor, Tensor]) -> list[Tridiagonal]:
    """The matrix T of every column."""
    return [Tridiagonal(a, b) for a, b in zip(*(t.mT for t in coefficients), strict=True)]


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
