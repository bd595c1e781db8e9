"""Prescribed spectra λ_1 ≥ ... ≥ λ_n on which estimators of traces behave differently."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor


def flat(n: int) -> Tensor:
    """From 3 to 1: nothing stands out."""
    return torch.linspace(3, 1, n, dtype=torch.float64)


def polynomial(n: int, power: float = -2.0) -> Tensor:
    """1, 2⁻², 3⁻², ..."""
    return torch.arange(1, n + 1, dtype=torch.float64) ** power


def exponential(n: int, base: float = 0.9) -> Tensor:
    """1, b, b², ..."""
    return base ** torch.arange(n, dtype=torch.float64)


def step(n: int, ones: int = 50, rest: float = 1e-8) -> Tensor:
    """Some ones, and a floor."""
    eigenvalues = torch.full((n,), rest, dtype=torch.float64)
    eigenvalues[:ones] = 1
    return eigenvalues


def neural(n: int) -> Tensor:
    """As of a network's Hessian: ten outliers, five negative ones, a semicircle of radius 1/2."""
    outliers = torch.linspace(10, 2, 10, dtype=torch.float64)
    negative = torch.linspace(-0.7, -1.5, 5, dtype=torch.float64)
    return torch.cat([outliers, 0.5 * semicircle(n - 15), negative])


def semicircle(n: int) -> Tensor:
    """Quantiles of Wigner's semicircle law on [-1, 1], from the largest on."""

    def cdf(x: float) -> float:
        return float(0.5 + (x * np.sqrt(1 - x * x) + np.arcsin(x)) / np.pi)

    levels = (np.arange(n, 0, -1) - 0.5) / n
    quantiles = [brentq(lambda x, q=q: cdf(x) - q, -1, 1, xtol=1e-15) for q in levels]
    return torch.tensor(quantiles, dtype=torch.float64)
