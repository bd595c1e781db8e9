"""What every eigensolver is asked for, in the same words."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from torchlinop.operators.base import CurvatureOperator

End = Literal["LA", "SA", "LM"]


@dataclass(frozen=True)
class Request:
    """The k pairs at one end of the spectrum, each with ‖A x − λ x‖ ≤ tol |λ|.

    ``smallest`` and ``norm`` are for solvers whose tol means something else: ``tol * smallest`` is
    absolute, ``tol * smallest / norm`` relative to ‖A‖. They are no more than estimates.
    """

    k: int = 10
    which: End = "LA"
    tol: float = 1e-6
    budget: int = 1000  # products: one more raises ProductBudgetError in the product itself
    seconds: float = math.inf  # likewise
    seed: int = 0
    smallest: float = 1.0  # |λ| of the last pair wanted, about
    norm: float = 1.0  # ‖A‖, about

    @property
    def absolute_tol(self) -> float:
        """For solvers that take residuals as they are."""
        return self.tol * self.smallest

    @property
    def tol_of_norm(self) -> float:
        """For solvers that divide residuals by ‖A‖."""
        return self.tol * self.smallest / self.norm

    def start(self, A: CurvatureOperator, columns: int = 1) -> Tensor:
        """The block (n, columns) that every solver of this seed starts from, if it takes one.

        Column i depends on the seed and i alone. In float64 the first is that of
        hessian-eigenthings, which takes seeds only.
        """
        generator = torch.Generator().manual_seed(self.seed)
        draws = [
            torch.randn(A.size, generator=generator, dtype=torch.float64) for _ in range(columns)
        ]
        return torch.stack(draws, dim=1).to(dtype=A.dtype, device=A.device)

    def of_seed(self, seed: int) -> Request:
        """The same with another start."""
        return replace(self, seed=seed)


@dataclass(frozen=True)
class TraceRequest:
    """An estimate of tr A from at most so many products."""

    num_matvecs: int = 60
    seed: int = 0


@dataclass(frozen=True)
class DensityRequest:
    """The distribution of eigenvalues from probes × steps products."""

    probes: int = 10
    steps: int = 40
    seed: int = 0


@dataclass(frozen=True)
class SolveRequest:
    """An x with ‖b − A x‖ ≤ rtol ‖b‖."""

    b: Tensor  # (n,)
    rtol: float = 1e-6
    budget: int = 1000
    seconds: float = math.inf
    seed: int = 0
