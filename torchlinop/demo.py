"""A model trained on real data without downloads, and the largest eigenvalues of its Hessian."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import nn

from torchlinop.adapters.scipy import as_linear_operator
from torchlinop.operators.hessian import HessianOperator
from torchlinop.testing.digits import digits_mlp
from torchlinop.testing.oracles import dense_hessian

__all__ = ["build", "digits_mlp"]


def build() -> tuple[nn.Module, list[Any], nn.Module]:
    """Model, data and loss of the demonstration, as a command wants them: torchlinop.demo:build."""
    problem = digits_mlp()
    return problem.model, problem.batches, problem.criterion


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
