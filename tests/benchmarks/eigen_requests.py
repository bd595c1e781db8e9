"""What is asked of an eigensolver, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from solver_problems import Counted
from torch import Tensor

POWER_STEPS = 100  # products a pair, the default of hessian-eigenthings and PyHessian


@dataclass(frozen=True)
class Request:
    """What every solver is asked for."""

    k: int = 10
    which: str = "LA"
    tol: float = 1e-6  # relative to the eigenvalue, for those that take it so
    seed: int = 0
    budget: int | None = None  # products to spend, for those that can be held to it

    def start(self, A: Counted, columns: int = 1) -> Tensor:
        """The first column is what hessian-eigenthings starts from."""
        generator = torch.Generator().manual_seed(self.seed)
        rows = [torch.randn(A.size, generator=generator, dtype=A.dtype) for _ in range(columns)]
        return torch.stack(rows).mT.to(A.device)


@dataclass(frozen=True)
class Answer:
    """The pairs returned, and what the solver says of them."""

    eigenvalues: Tensor  # (k,)
    eigenvectors: Tensor  # (n, k)
    residuals: Tensor | None = None  # (k,) claimed, absolute
    converged: Tensor | None = None  # (k,) called converged: residual below tol |λ|
    bounds: Tensor | None = None  # (k,) an eigenvalue is this near


Solve = Callable[[Counted, Request], Answer]
