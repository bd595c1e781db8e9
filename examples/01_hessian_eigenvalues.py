"""
Eigenvalues of a Hessian, by SciPy
==================================

Three lines from a trained model to the largest eigenvalues of its Hessian; where in the network
the sharpest direction lies; the block of one layer; and the dense answer beside them.
"""

import torch
from scipy.sparse.linalg import eigsh

from torchlinop import HessianOperator, as_linear_operator, match_names
from torchlinop.demo import digits_mlp
from torchlinop.testing.oracles import dense_hessian

problem = digits_mlp()  # a trained MLP, a list of batches, and loss_fn(model, batch)

# The Hessian of the mean loss over all batches, however they were cut.
H = HessianOperator(problem.model, problem.batches, problem.loss_fn)
print(H, "\n")

# %%
# Any solver of SciPy takes it.
eigenvalues, eigenvectors = eigsh(as_linear_operator(H), k=10, which="LA")
print("ten largest eigenvalues:")
print(torch.tensor(eigenvalues).flip(0), "\n")

# %%
# An eigenvector, parameter by parameter: where in the network is the sharpest direction?
sharpest = H.layout.unflatten(torch.from_numpy(eigenvectors[:, -1].copy()))
for name, tensor in sharpest.items():
    print(f"{name:10} {tuple(tensor.shape)!s:10} holds {tensor.square().sum():6.1%} of the square")

# %%
# The block of one layer is an operator, too.
last = HessianOperator(
    problem.model, problem.batches, problem.loss_fn, param_filter=match_names("2.*")
)
top = eigsh(as_linear_operator(last), k=1, which="LA", return_eigenvectors=False)
print(f"\nlargest eigenvalue of the last layer's block: {top[0]:.6f}\n")

# %%
# For comparison, the dense answer: a backward pass for each of the 1,810 rows.
dense = dense_hessian(problem.full_loss, problem.parameters, rows_at_once=64)
exact = torch.linalg.eigvalsh(dense)[-10:]
print("for comparison: the dense answer")
print(exact.flip(0))
print(f"largest difference: {(exact - torch.tensor(eigenvalues)).abs().max():.1e}")

# %%
# The picture, with ``pip install "torchlinop[plot]"``:
import matplotlib.pyplot as plt

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
left.plot(range(1, 11), exact.flip(0), "o", mfc="none", ms=10, label="dense")
left.plot(range(1, 11), eigenvalues[::-1], "x", label="eigsh")
left.set(xlabel="i", ylabel="eigenvalue", title="the ten largest")
left.legend()
right.barh([*sharpest], [float(tensor.square().sum()) for tensor in sharpest.values()])
right.invert_yaxis()
right.set(xlabel="share of the square", title="the sharpest direction")
plt.show()
