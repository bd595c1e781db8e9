"""
Seven curvature matrices of one network
=======================================

Hessian, GGN, Fisher (exact and drawn), empirical Fisher, K-FAC and EKFAC of an MLP trained on
digits: their largest eigenvalues, their traces, and how far their blocks are from those of the GGN.
"""

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import nn

from torchlinop import (
    EKFACOperator,
    EmpiricalFisherOperator,
    FisherOperator,
    GGNOperator,
    HessianOperator,
    KFACOperator,
    as_linear_operator,
)
from torchlinop.demo import digits_mlp
from torchlinop.testing.oracles import dense_hessian, dense_jacobian

problem = digits_mlp()  # 64-24-10, trained on digits
model, data = problem.model, problem.batches[-2:]  # 256 and 5 digits, to be quick
N = sum(len(y) for _, y in data)
H = HessianOperator(model, data, problem.loss_fn)

# %%
# The others look at the outputs in between: a forward function, and the loss of its outputs.
of_outputs = (model, data, lambda model, batch: model(batch[0]), nn.CrossEntropyLoss())
matrices = {
    "Hessian": H,
    "GGN": GGNOperator(*of_outputs),
    "Fisher": FisherOperator(*of_outputs),
    "Fisher, 1 draw": FisherOperator(*of_outputs, mc_samples=1),
    "empirical Fisher": EmpiricalFisherOperator(*of_outputs),
    "K-FAC": KFACOperator(*of_outputs),
    "EKFAC": EKFACOperator(*of_outputs),
}


def largest(operator):
    A = as_linear_operator(operator)
    return eigsh(A, k=3, which="LA", v0=np.ones(operator.size), return_eigenvectors=False)[::-1]


# %%
# K-FAC has blocks only: one for every weight and every bias. Distances are between such blocks.
block = torch.cat([torch.full((slot.numel,), i) for i, slot in enumerate(H.layout.slots)])
same_block = block[:, None] == block
dense = {name: operator.to_dense() for name, operator in matrices.items()}
G = dense["GGN"] * same_block

print(f"{'':18}{'largest eigenvalues':^30}{'trace':>10}{'blocks, from those of the GGN':>32}")
for name, operator in matrices.items():
    values = "".join(f"{value:10.4f}" for value in largest(operator))
    distance = (dense[name] * same_block - G).norm() / G.norm()
    print(f"{name:18}{values}{dense[name].trace():10.4f}{distance:31.1%}")

# %%
# The definitions themselves, sample by sample: J_n is (10, n), p_n the softmax, g_n the gradient.
exact = {name: torch.zeros_like(G) for name in ("GGN", "empirical Fisher")}
for X, y in data:
    J = dense_jacobian(lambda X=X: model(X), problem.parameters, rows_at_once=64)
    J, P = J.view(len(X), 10, -1), model(X).softmax(1).detach()
    M = torch.diag_embed(P) - P[:, :, None] * P[:, None, :]
    g = torch.einsum("ncp,nc->np", J, P - nn.functional.one_hot(y, 10))
    exact["GGN"] += (M @ J).flatten(0, 1).T @ J.flatten(0, 1) / N
    exact["empirical Fisher"] += g.T @ g / N
X, y = (torch.cat(parts) for parts in zip(*data, strict=True))
exact["Hessian"] = dense_hessian(
    lambda: problem.loss_fn(model, (X, y)), problem.parameters, rows_at_once=64
)

print("\nfor comparison: the dense answer")
for name, matrix in exact.items():
    top = torch.linalg.eigvalsh(matrix)[-3:].flip(0).tolist()
    values = "".join(f"{value:10.4f}" for value in top)
    error = (matrix - dense[name]).abs().max() / matrix.abs().max()
    print(f"{name:18}{values}{matrix.trace():10.4f}    largest difference {error:.0e}")

# %%
# The picture, with ``pip install "torchlinop[plot]"``:
# logarithms of the entries, for weights and biases of the last layer.
import matplotlib.pyplot as plt

figure, axes = plt.subplots(2, 4, figsize=(10, 5.4), layout="constrained")
last = slice(H.size - 250, H.size)
for ax in axes.flat:
    ax.axis("off")
for ax, (name, A) in zip(axes.flat, dense.items(), strict=False):
    image = ax.imshow(A[last, last].abs().clamp_min(1e-12).log10(), vmin=-6, vmax=-1)
    ax.set_title(name)
figure.colorbar(image, ax=axes, shrink=0.6, label="log10 |entry|")
plt.show()
