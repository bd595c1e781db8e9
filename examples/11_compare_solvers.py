"""Eigensolvers on the same matrices: a table, a page with pictures, and a solver of one's own."""

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
print(f"\npictures: {page}")

print("\nfor comparison: the dense answer")
print(torch.linalg.eigvalsh(matrices["clusters"].to_dense()).flip(0)[:5])
