"""A model trained on real data without downloads, and the largest eigenvalues of its Hessian."""

from __future__ import annotations

import copy
import functools
import time

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import nn

from torchlinop.adapters.scipy import as_linear_operator
from torchlinop.operators.hessian import HessianOperator
from torchlinop.testing.gallery import Problem, cross_entropy, in_batches
from torchlinop.testing.oracles import dense_hessian

_SIZES = (256,) * 7 + (5,)  # 1,797 samples: the last batch is ragged


def digits_mlp(dtype: torch.dtype = torch.float64, *, steps: int = 60, seed: int = 0) -> Problem:
    """An MLP 64-24-10 (1,810 parameters) trained on scikit-learn's digits, in eight batches.

    Trained by ``steps`` full-batch steps of SGD (rate 0.1, momentum 0.9) from ``seed``, in about
    a second; a second call gives a copy of the same model.

    Raises:
        ModuleNotFoundError: scikit-learn is missing; ``pip install "torchlinop[demo]"``.
    """
    return copy.deepcopy(_trained(dtype, steps, seed))


@functools.cache
def _trained(dtype: torch.dtype, steps: int, seed: int) -> Problem:
    X, y = _digits(dtype)
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


def _digits(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'the digits come with scikit-learn: pip install "torchlinop[demo]"'
        ) from error
    digits = load_digits()
    return torch.tensor(digits.data / 16, dtype=dtype), torch.tensor(digits.target)


def main() -> None:
    """Print ten eigenvalues by SciPy's eigsh, their residuals, and the dense answer beside them."""
    problem = digits_mlp()
    H = HessianOperator(problem.model, problem.batches, problem.loss_fn)
    A = as_linear_operator(H)
    print(H)

    start = time.perf_counter()
    eigenvalues, eigenvectors = eigsh(A, k=10, which="LA", v0=np.ones(H.size))
    seconds = time.perf_counter() - start
    residuals = np.linalg.norm(A @ eigenvectors - eigenvectors * eigenvalues, axis=0)
    print(f"eigsh: {A.matvecs} products, {seconds:.2f} s")

    start = time.perf_counter()
    dense = dense_hessian(problem.full_loss, problem.parameters, rows_at_once=64)
    exact = torch.linalg.eigvalsh(dense)
    print(f"dense: {H.size} backward passes, {time.perf_counter() - start:.2f} s\n")
    print("   i     eigenvalue    residual      dense answer    difference")
    for i in range(1, 11):
        value, truth = eigenvalues[-i], float(exact[-i])
        print(f"{i:4}{value:15.10f}{residuals[-i]:12.1e}{truth:18.10f}{abs(value - truth):14.1e}")


if __name__ == "__main__":
    main()
