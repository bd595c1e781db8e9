"""
Compare solvers
===============

Eigensolvers of several libraries, and one of our own, on the same counted matrices: a table, a page
with pictures, and all numbers.
"""

import tempfile
from pathlib import Path

import torch

from torchlinop import HessianOperator
from torchlinop.compare import compare, eigensolver
from torchlinop.demo import digits_mlp
from torchlinop.testing import RotatedOperator, spectra

torch.set_num_threads(1)  # the matrices are small


@eigensolver("mine: subspace iteration")
def subspace_iteration(A, request):
    X = request.start(A, request.k)  # the same start as everyone's
    for _ in range(request.budget // request.k - 1):  # as many as it may, and one is left
        X = torch.linalg.qr(A @ X).Q  # the product beyond the budget would raise
    return (X * (A @ X)).sum(0), X  # or an Answer, with claims


# %%
# Two matrices: one that knows its eigenvalues, and a Hessian.
problem = digits_mlp()  # a trained MLP
hessian = HessianOperator(problem.model, problem.batches[:1], problem.loss_fn)
matrices = {
    "clusters": RotatedOperator(spectra.clustered(300)),  # knows its eigenvalues
    "the Hessian of an MLP on digits": hessian,
}
solvers = [
    "torchlinop lanczos",
    "torchlinop lanczos, block_size=4",
    "scipy eigsh",
    "*lobpcg",  # of three libraries
    "hessian-eigenthings lanczos, 100 steps",  # a row says so where it is not installed
    "mine*",
]
found = compare(matrices, k=5, solvers=solvers, budget=200, seeds=2, memory=False)
print(found)

page = found.to_html(Path(tempfile.mkdtemp()) / "solvers.html")
found.save(page.with_suffix(".json"))
print(f"\npictures: {page.name}")

print("\nfor comparison: the dense answer")
print(torch.linalg.eigvalsh(matrices["clusters"].to_dense()).flip(0)[:5])

# %%
# The picture, with ``pip install "torchlinop[plot]"``:
# every point is a run of its own, with a smaller budget.
import matplotlib.pyplot as plt

figure, axes = plt.subplots(1, 2, figsize=(12, 3.6), layout="constrained", sharey=True)
for ax, name in zip(axes, found.problems, strict=True):
    for history in found.histories:
        if history.problem == name:
            ax.loglog(history.products, history.values, "o-", ms=3, label=history.solver)
    ax.set(title=name, xlabel="products")
axes[0].set_ylabel(found.measure)
figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right center")
plt.show()
