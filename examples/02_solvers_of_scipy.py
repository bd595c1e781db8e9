"""
Many solvers of SciPy on one Hessian
====================================

What takes a ``LinearOperator`` takes a Hessian: lobpcg, svds, minres, expm_multiply.
"""

import numpy as np
import scipy.linalg
from scipy.sparse.linalg import expm_multiply, lobpcg, minres, svds

from torchlinop import HessianOperator, as_linear_operator, match_names
from torchlinop.demo import digits_mlp
from torchlinop.testing.oracles import dense_hessian

problem = digits_mlp()
last_layer = list(problem.model[2].parameters())
H = HessianOperator(
    problem.model, problem.batches, problem.loss_fn, param_filter=match_names("2.*")
)
A = as_linear_operator(H)
print(A)

dense = dense_hessian(problem.full_loss, last_layer).numpy()
exact = np.linalg.eigvalsh(dense)[::-1]
rng = np.random.default_rng(0)
reports = []


def report(name, value, truth, products):
    error = np.linalg.norm(value - truth) / np.linalg.norm(truth)
    print(f"{name:42}{products:5} products    relative error {error:.1e}")
    reports.append((name.split(":")[0], products, error))


# %%
# Eigenvalues by blocks: all columns of a block go through the network together.
X = rng.standard_normal((H.size, 8))
values, _ = lobpcg(A, X, tol=1e-6, maxiter=200, largest=True)
report("lobpcg: 5 largest eigenvalues", values[:5], exact[:5], A.matvecs)

# %%
# The singular values of a symmetric matrix are the moduli of its eigenvalues.
before = A.matvecs
values = svds(A, k=5, return_singular_vectors=False, v0=np.ones(H.size))
moduli = np.sort(np.abs(exact))
report("svds: 5 largest singular values", np.sort(values), moduli[-5:], A.matvecs - before)

# %%
# A damped Newton step: (H + I/10) step = -gradient. Minres does not mind negative curvature.
# Shifted before it is wrapped, the operator keeps its dtype and takes blocks in one pass.
damped = as_linear_operator(H.shift(0.1))
gradient = H.gradient().numpy()
step, info = minres(damped, -gradient, rtol=1e-12)
truth = np.linalg.solve(dense + 0.1 * np.eye(H.size), -gradient)
report(f"minres: a damped Newton step (info {info})", step, truth, damped.matvecs)

# %%
# Gradient flow on the quadratic model: theta(t) - theta* = exp(-t H) (theta(0) - theta*).
flow = -1.0 * A
v = rng.standard_normal(H.size)
moved = expm_multiply(flow, v, traceA=-np.trace(dense))
report(
    "expm_multiply: gradient flow for time 1", moved, scipy.linalg.expm(-dense) @ v, flow.matvecs
)

print("\nfor comparison: the dense answer")
print(exact[:5])

# %%
# The picture, with ``pip install "torchlinop[plot]"``:
import matplotlib.pyplot as plt

figure, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
for name, products, error in reports:
    ax.semilogy(products, error, "o")
    ax.annotate(name, (products, error), xytext=(6, 4), textcoords="offset points")
ax.margins(x=0.3, y=0.2)
ax.set(xlabel="products", ylabel="relative error")
plt.show()
