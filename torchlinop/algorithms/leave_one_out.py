"""Leave-one-out estimators, and their jackknife: √((k-1)/k Σ (t_i - t̄)²), t_i without probe i."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from torchlinop.algorithms.hutchinson import Estimate

# c(dimension, squared length): by what a residual sample is multiplied.
Rescaling = Callable[[int, Tensor], Tensor]


class LeaveOneOut(Protocol):
    """An estimator in which every probe samples what all other probes have left."""

    def samples(self) -> Tensor:
        """An unbiased estimate (k,) for every probe."""
        ...

    def without(self, i: int) -> LeaveOneOut:
        """The same estimator, of the other probes."""
        ...


def jackknifed(estimator: LeaveOneOut) -> Estimate:
    """The mean of the samples, and its jackknife standard error.

    The samples share all probes but one: their spread is up to 1.6 times too small, or 3 times
    for Nyström approximations. The jackknife, √((k-1)/k Σ (t_i - t̄)²) over the estimates t_i
    without probe i, errs on the other side (Efron and Stein, Annals of Statistics 9, 1981;
    Epperly and Tropp, SIAM J. Sci. Comput. 46, 2024).
    """
    samples = estimator.samples()
    k = len(samples)
    others = torch.stack([estimator.without(i).samples().mean() for i in range(k)])
    return Estimate(samples, float(others.std(correction=0) * (k - 1) ** 0.5))


def resphere(dimension: int, squares: Tensor) -> Tensor:
    """Probes rescaled to their expected length in a subspace, of which they are isotropic."""
    return dimension / squares


def keep(dimension: int, squares: Tensor) -> Tensor:
    """Probes as they are: E[ω ωᵀ] = I."""
    return torch.ones_like(squares)


def rescaling(distribution: str) -> Rescaling:
    """Directions of Rademacher probes are not isotropic: rescaling would make a bias."""
    return keep if distribution == "rademacher" else resphere


def without_direction(S: Tensor, i: int) -> Tensor:
    """The unit vectors S, but for column i, without their parts along it: unit vectors again."""
    s, S = S[:, i : i + 1], drop(S, i)
    for _ in range(2):  # nearly parallel ones lose most of their digits in the first
        S = normalize(S - s @ (s.T @ S), dim=0, eps=torch.finfo(S.dtype).tiny)
    return S


def drop(X: Tensor, i: int) -> Tensor:
    """X without its column i."""
    return torch.cat([X[..., :i], X[..., i + 1 :]], dim=-1)
