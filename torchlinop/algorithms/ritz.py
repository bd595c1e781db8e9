"""Ritz pairs, which of them are wanted, and how accurate they have to be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Which = Literal["LM", "LA", "SA", "BE"]
Status = Literal[
    "converged", "exact", "stagnated", "maxmatvecs", "maxseconds", "interrupted"
]  # fmt: skip

_MOSTLY = 1.5  # times its rounding: a residual that is no larger is rounding for the most part


@dataclass(frozen=True)
class Ritz:
    """The eigenpairs of T, in the order wanted, with the norms ``‖S y‖`` of their residuals."""

    values: Tensor  # (j,) float64, on the CPU, as is all here
    vectors: Tensor  # (j, j)
    residuals: Tensor  # (j,) with their noise
    coupling: Tensor  # (w, j) S Y
    norm: float  # the largest |θ|, an estimate of ‖A‖ from below
    floor: float  # no residual is smaller, however small its recurrence
    noise: Tensor | None = None  # (j,) the share of rounding, where more is known of it

    def least(self, k: int) -> Tensor:
        """What no further product improves the first k residuals below."""
        if self.noise is None:
            return torch.full((k,), self.floor, dtype=torch.float64)
        return self.noise[:k].clamp_min(self.floor)


def order_of(values: Tensor, which: Which) -> Tensor:
    """The order in which eigenvalues are wanted."""
    if which == "LM":
        return torch.argsort(values.abs(), descending=True, stable=True)
    order = torch.argsort(values, descending=which != "SA", stable=True)
    if which != "BE":
        return order
    both = torch.stack([order, order.flip(0)], dim=1).flatten()  # largest, smallest, ...
    return both[: len(order)]


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
        zero = theta <= self.zero * ritz.norm
        return torch.where(
            zero, torch.maximum(relative, _MOSTLY * ritz.least(len(theta))), relative
        )

    def reached(self, ritz: Ritz) -> Tensor:
        """Which of the first k pairs are as accurate as wanted: (min(k, j),) bool."""
        return ritz.residuals[: self.k].clamp_min(ritz.floor) <= self.bounds(ritz)

    def exhausted(self, ritz: Ritz) -> bool:
        """Whether no further product makes any of k pairs better."""
        return self.excess(ritz) <= 0

    def exhausted_by_all(self, ritz: Ritz) -> bool:
        """The same of all pairs: the space that they span is invariant, as far as can be told.

        Rounding, amplified by the steps, ends few Krylov spaces at a residual of zero: where θ is
        next to nothing, that of a step is compared with tol ε^(1/3) ‖A‖.
        """
        theta = ritz.values.abs().clamp_min(self.eps ** (1 / 3) * ritz.norm)
        bounds = torch.maximum(self.tol * theta, _MOSTLY * ritz.least(len(theta)))
        return bool((ritz.residuals <= bounds).all())

    def excess(self, ritz: Ritz) -> float:
        """log(r / r wanted, or possible) of the worst of k; infinite where fewer are known."""
        if len(ritz.values) < self.k:
            return math.inf
        rounding = _MOSTLY * ritz.least(self.k)
        bounds = torch.maximum(self.bounds(ritz), rounding)
        return float((ritz.residuals[: self.k] / bounds.clamp_min(1e-300)).log().max())
