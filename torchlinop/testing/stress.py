"""The operators on which solvers return wrong numbers: multiple, few, tiny, huge eigenvalues."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinop.errors import OptionError
from torchlinop.testing.rotated import RotatedOperator
from torchlinop.testing.spectra import neural, semicircle

_LEAST = 20


def stress_spectra(n: int = 200) -> dict[str, Tensor]:
    """Eigenvalues (n,) in float64, descending, by name.

    Identity and zero are invariant at once, low rank soon, {1, 50} and mirrored pairs after a few
    steps: there recurrences divide by zero. Copies ("4-fold") are missed, outliers ("neural") come
    in ghosts, and absolute thresholds mistake small matrices for zero.

    Raises:
        OptionError: n is below 20, too few for the outliers of "neural" and a bulk.
    """
    if n < _LEAST:
        raise OptionError(f"expected n from {_LEAST} on, got {n}; leave it out for 200")
    i = torch.arange(n, dtype=torch.float64)
    bulk = 0.5 * semicircle(n - 4)
    spectra = {
        "identity": torch.ones_like(i),
        "zero": torch.zeros_like(i),
        "rank 1": 10.0 * (i == 0),
        "rank 5": (5 - i).clamp_min(0),
        "1 and 50": 1 + 49.0 * (i < 3),
        "4-fold": torch.cat([torch.full((4,), 10.0, dtype=torch.float64), bulk]),
        "mirrored": torch.cat([torch.tensor([10, 5, -5, -10], dtype=torch.float64), bulk]),
        "neural": neural(n),
        "scale 1e-12": 1e-12 * neural(n),
        "scale 1e12": 1e12 * neural(n),
        "condition 1e16": 10 ** (-16 * i / (n - 1)),
    }
    return {name: s.sort(descending=True).values for name, s in spectra.items()}


def stress_operators(
    n: int = 200, dtype: torch.dtype = torch.float64, *, seed: int = 0
) -> dict[str, RotatedOperator]:
    """Operators of these spectra in float64 or float32, by name; each has its ``eigenvalues``."""
    return {name: RotatedOperator(s.to(dtype), seed=seed) for name, s in stress_spectra(n).items()}
