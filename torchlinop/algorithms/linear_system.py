"""``(A + damping I) X = B``, and how well it is to be solved, as every solver is given it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from torchlinop.algorithms.products import Products
from torchlinop.operators.base import CurvatureOperator


class StopOptions(TypedDict, total=False):
    """When a solver stops, and what it shows; `solve` explains them."""

    rtol: float | None
    max_iter: int | None
    max_seconds: float
    progress: bool
    strict: bool


class SolveOptions(StopOptions, total=False):
    """What a solver may be given besides the operator and b; `solve` explains them."""

    damping: float
    preconditioner: CurvatureOperator | None


@dataclass(frozen=True)
class System:
    """``(A + damping I) X = B``, checked, with what is asked of its solution."""

    A: Products
    B: Tensor  # (n, k) of norms between 1 and 2, or 0
    units: Tensor  # (k,) what columns were divided by
    M: CurvatureOperator | None  # about the inverse, positive definite
    shape: torch.Size  # of what the caller passed as b
    rtol: float
    max_iter: int

    def precondition(self, R: Tensor) -> Tensor:
        return R if self.M is None else self.M.matmat(R.to(self.M.dtype)).to(R.dtype)
