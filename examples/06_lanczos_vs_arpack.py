"""
Our Lanczos beside ARPACK
=========================

Ten eigenvalues of a Hessian, twice: by ``lanczos`` on torch tensors, and by SciPy's ``eigsh``. The
products are counted by the operator, and the residuals taken by products, not as claimed.
"""

import time

import torch
from scipy.sparse.linalg import eigsh

from torchlinop import CountingOperator, HessianOperator, as_linear_operator, lanczos
from torchlinop.demo import digits_mlp
from torchlinop.testing.oracles import dense_hessian

problem = digits_mlp()  # a trained MLP, a list of batches, and loss_fn(model, batch)
H = HessianOperator(problem.model, problem.batches, problem.loss_fn)
H @ H.space.random(1)[:, 0]  # the graph is built at the first product, at nobody's expense
print(H, "\n")


def ours(A, **options):
    return lanczos(A, k=10, which="LA", **options)


def arpack(A, **options):
    values, vectors = eigsh(as_linear_operator(A), k=10, which="LA", **options)
    return torch.from_numpy(values).flip(0), torch.from_numpy(vectors).flip(1)


# %%
# Both are judged by the dense answer.
dense = dense_hessian(problem.full_loss, problem.parameters, rows_at_once=64)
exact = torch.linalg.eigvalsh(dense).flip(0)[:10]


def report(name, solver, **options):
    counted = CountingOperator(H)
    started = time.perf_counter()
    values, vectors = solver(counted, **options)
    seconds = time.perf_counter() - started
    residual = (H @ vectors - vectors * values).norm(dim=0).max()  # by products, not as claimed
    error = (values - exact).abs().max()
    print(f"{name:22}{counted.matvecs:9}{seconds:9.2f} s{residual:14.1e}{error:12.1e}")


print(f"{'':22}{'products':>9}{'time':>11}{'max residual':>14}{'max error':>12}")
report("lanczos, tol=1e-6", ours)
report("eigsh,   tol=1e-6", arpack, tol=1e-6)
report("lanczos, tol=1e-12", ours, tol=1e-12)
report("eigsh,   tol=0", arpack)
print()

# %%
# What ARPACK does not tell: residuals, error bounds, and where in the network a direction lies.
result = ours(H)
print(result, "\n")

print("for comparison: the dense answer")
print(exact)
print(f"largest difference: {(result.eigenvalues - exact).abs().max():.1e}")

# %%
# The picture, with ``pip install "torchlinop[plot]"``:
# residuals of the ten pairs in the course of the run to 1e-12.
import matplotlib.pyplot as plt

run = ours(H, tol=1e-12)
figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
ax.semilogy(run.history_matvecs, run.history_residuals / run.eigenvalues, "o-", ms=3)
ax.axhline(1e-12, color="k", lw=0.8, ls=":")
ax.set(xlabel="products", ylabel="residual / eigenvalue")
ax.legend([f"pair {i}" for i in range(1, 11)], ncols=2, fontsize="small")
plt.show()
