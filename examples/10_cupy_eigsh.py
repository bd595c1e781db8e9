"""
CuPy's solvers on a Hessian
===========================

Needs a GPU, and is not executed when this page is made. Ten eigenvalues of a Hessian by cupyx, in
place; by SciPy, through the host; and by ``lanczos``.
"""

import sys
import time

import torch

if not torch.cuda.is_available():
    print("This example needs a GPU, and torch sees none.")
    sys.exit()

from cupyx.scipy.sparse import linalg as cupyx_linalg
from scipy.sparse import linalg as scipy_linalg

from torchlinop import (
    CountingOperator,
    HessianOperator,
    as_cupy_operator,
    as_linear_operator,
    cupy_eigsh,
    lanczos,
)
from torchlinop.demo import digits_mlp
from torchlinop.testing.oracles import dense_hessian

problem = digits_mlp()  # a trained MLP, a list of batches, and loss_fn(model, batch)
dense = dense_hessian(problem.full_loss, problem.parameters, rows_at_once=64)
exact = torch.linalg.eigvalsh(dense).flip(0)[:10]

H = HessianOperator(problem.model.cuda(), problem.batches, problem.loss_fn)
H @ H.space.random(1)[:, 0]  # the graph is built at the first product, at nobody's expense
print(H, "\n")


def raw_cupyx(A):
    # Its tolerance is absolute: what is 1e-6 of the largest eigenvalue has to be known before.
    values, vectors = cupyx_linalg.eigsh(as_cupy_operator(A), 10, which="LA", tol=1e-6)
    return torch.from_dlpack(values).flip(0), torch.from_dlpack(vectors).flip(1)


def scipy(A):
    values, vectors = scipy_linalg.eigsh(as_linear_operator(A), 10, which="LA", tol=1e-6)
    return torch.tensor(values).flip(0).cuda(), torch.tensor(vectors).flip(1).cuda()


def report(name, solver):
    counted = CountingOperator(H)
    started = time.perf_counter()
    values, vectors = solver(counted)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    residual = (H @ vectors - vectors * values).norm(dim=0).max()
    error = (values.cpu() - exact).abs().max()
    print(f"{name:32}{counted.matvecs:9}{seconds:9.2f} s{residual:14.1e}{error:12.1e}")


print(f"{'':32}{'products':>9}{'time':>11}{'max residual':>14}{'max error':>12}")
report("cupyx eigsh, no byte copied", raw_cupyx)
report("cupy_eigsh, relative tolerance", lambda A: cupy_eigsh(A, 10, which="LA"))
report("SciPy eigsh, through the host", scipy)
report("lanczos", lambda A: lanczos(A, 10, which="LA"))

print("\nfor comparison: the dense answer")
print(exact)
