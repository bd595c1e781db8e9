"""Scikit-learn's digits, which need no download: a trained network, and a softmax regression."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn

from torchlinop.testing.model_problem import Problem, cross_entropy, in_batches

_SIZES = (256,) * 7 + (5,)  # 1,797 samples: the last batch is ragged


def digits_mlp(dtype: torch.dtype = torch.float64, *, steps: int = 60, seed: int = 0) -> Problem:
    """An MLP 64-24-10 (1,810 parameters) trained on scikit-learn's digits, in eight batches.

    Trained by ``steps`` full-batch steps of SGD (rate 0.1, momentum 0.9) from ``seed``, in about
    a second; a second call gives a copy of the same model.

    Raises:
        ModuleNotFoundError: scikit-learn is missing; ``pip install "torchlinop[demo]"``.
    """
    return copy.deepcopy(_trained(dtype, steps, seed))


def digits_softmax(dtype: torch.dtype = torch.float64) -> Problem:
    """Softmax regression 64-10 without bias at W = 0, where ``H = XᵀX/N ⊗ (I − 11ᵀ/10)/10``.

    Hessian, GGN and Fisher matrix are one, and every eigenvalue but 0 comes nine times.

    Raises:
        ModuleNotFoundError: scikit-learn is missing; ``pip install "torchlinop[demo]"``.
    """
    full = digits(dtype)
    model = nn.Linear(64, 10, bias=False).to(dtype)
    nn.init.zeros_(model.weight)
    return Problem(model, in_batches(full, *_SIZES), cross_entropy, full)


def digits(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """1,797 images (N, 64) with entries from 0 to 1, and their labels (N,)."""
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415  # optional package
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'the digits come with scikit-learn: pip install "torchlinop[demo]"'
        ) from error
    images = load_digits()
    return torch.tensor(images.data / 16, dtype=dtype), torch.tensor(images.target)


@functools.cache
def _trained(dtype: torch.dtype, steps: int, seed: int) -> Problem:
    X, y = digits(dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model, (X, y)).backward()
        optimizer.step()
    model.zero_grad()
    return Problem(model.eval(), in_batches((X, y), *_SIZES), cross_entropy, (X, y))
