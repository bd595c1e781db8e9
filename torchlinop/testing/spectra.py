"""Prescribed spectra λ_1 ≥ ... ≥ λ_n on which solvers and estimators behave differently."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinop.choices import refuse_unknown


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


def clustered(n: int) -> Tensor:
    """10 four times, 9.99 three times, 9, 8.999, 8.998, and a bulk from 1 to 0."""
    top = torch.tensor([10] * 4 + [9.99] * 3 + [9, 8.999, 8.998], dtype=torch.float64)
    return torch.cat([top, torch.linspace(1, 0, n - 10, dtype=torch.float64)])


def multiple(n: int, copies: int = 4) -> Tensor:
    """10, 8, 6, 4, 2, so many copies of each at most, and a semicircle of radius 1/2."""
    values = torch.tensor([10, 8, 6, 4, 2], dtype=torch.float64)
    top = values.repeat_interleave(min(copies, n // len(values)))
    return torch.cat([top, 0.5 * semicircle(n - len(top))])


def indefinite(n: int) -> Tensor:
    """±1, ±1/√2, ±1/√3, ..., and a zero in between if n is odd."""
    half = polynomial(n // 2, -0.5)
    return torch.cat([half, half.new_zeros(n % 2), -half.flip(0)])


def low_rank(n: int, rank: int = 5) -> Tensor:
    """r, r - 1, ..., 1, 0, 0, ..."""
    return (rank - torch.arange(n, dtype=torch.float64)).clamp_min(0)


def two_values(n: int, largest: float = 50.0, copies: int = 3) -> Tensor:
    """One value so many times, then ones."""
    eigenvalues = torch.ones(n, dtype=torch.float64)
    eigenvalues[:copies] = largest
    return eigenvalues


def semicircle(n: int) -> Tensor:
    """Quantiles of Wigner's semicircle law on [-1, 1], from the largest on.

    With x = sin φ, its distribution function is ``1/2 + (φ + sin φ cos φ) / π``.
    """
    excess = 0.5 - (torch.arange((n + 1) // 2, dtype=torch.float64) + 0.5) / n  # over one half
    low = torch.zeros_like(excess)
    high = low + torch.pi / 2
    for _ in range(20):  # bisection, then Newton from so near that tails are safe
        phi = (low + high) / 2
        above = (phi + phi.sin() * phi.cos()) / torch.pi > excess
        low, high = torch.where(above, low, phi), torch.where(above, phi, high)
    for _ in range(3):
        mass = (phi + phi.sin() * phi.cos()) / torch.pi
        phi = phi - torch.pi * (mass - excess) / (2 * phi.cos() ** 2)
    positive = phi.sin()
    return torch.cat([positive, -positive[: n // 2].flip(0)])


def wanted(eigenvalues: Tensor, which: str, k: int) -> Tensor:
    """The k of these eigenvalues at the LA, SA or LM end, the most wanted first."""
    return eigenvalues[places_wanted(eigenvalues, which, k)]


def places_wanted(eigenvalues: Tensor, which: str, k: int) -> Tensor:
    """Where these k are: (k,).

    Raises:
        OptionError: another end.
    """
    real = eigenvalues.real
    keys = {"LA": -real, "SA": real, "LM": -eigenvalues.abs()}
    refuse_unknown("which", which, keys)
    return keys[which].argsort()[:k]
