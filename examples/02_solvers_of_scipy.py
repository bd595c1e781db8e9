"""One Hessian, many solvers of SciPy: lobpcg, svds, minres, expm_multiply."""

import numpy as np
import scipy.linalg
import torch
from scipy.sparse.linalg import expm_multiply, lobpcg, minres, svds

from torchlinop import HessianOperator, as_linear_operator
from torchlinop.demo import digits_mlp
from torchlinop.testing.oracles import dense_hessian

problem = digits_mlp()
H = HessianOperator(problem.model, problem.batches, problem.loss_fn)
A = as_linear_operator(H)
dense = dense_hessian(problem.full_loss, problem.parameters).numpy()
exact = np.linalg.eigvalsh(dense)
rng = np.random.default_rng(0)


def report(name, value, truth, products):
    error = np.linalg.norm(value - truth) / np.linalg.norm(truth)
    print(f"{name:42} {products:5} products   relative error {error:.1e}")


def products_of(solve):
    before = A.matvecs
    return solve(), A.matvecs - before


# Eigenvalues by blocks: one pass through the network multiplies all columns.
(values, _), count = products_of(
    lambda: lobpcg(A, rng.standard_normal((H.size, 12)), tol=1e-6, maxiter=200, largest=True)
)
report("lobpcg: 5 largest eigenvalues", values[:5], exact[::-1][:5], count)

# Singular values of a symmetric matrix are the moduli of its eigenvalues.
values, count = products_of(
    lambda: svds(A, k=5, return_singular_vectors=False, v0=np.ones(H.size))
)
report("svds: 5 largest singular values", np.sort(values), np.sort(np.abs(exact))[-5:], count)

# A damped Newton step: (H + mu I) step = -gradient. MINRES does not mind negative curvature.
gradient = H.gradient().numpy()
damping = 0.1
(step, info), count = products_of(
    lambda: minres(as_linear_operator(H.shift(damping)), -gradient, rtol=1e-12)
)
truth = np.linalg.solve(dense + damping * np.eye(H.size), -gradient)
assert info == 0
report("minres: a damped Newton step", step, truth, count or "(own)")

# Gradient flow: theta(t) - theta* = exp(-t H) (theta(0) - theta*) on the quadratic model.
direction = rng.standard_normal(H.size)
trace = H.to_dense().trace()
flow, count = products_of(lambda: expm_multiply(-1.0 * A, direction, traceA=-float(trace)))
report("expm_multiply: gradient flow for time 1", flow, scipy.linalg.expm(-dense) @ direction, "(own)")

print("\nfor comparison: the dense answer")
print(torch.tensor(exact[::-1][:5].copy()))
