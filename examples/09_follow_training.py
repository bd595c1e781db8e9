"""
Eigenvalues along training
==========================

The three largest eigenvalues of a Hessian after every epoch, each Lanczos run started from the
result of the one before.
"""

import torch

from torchlinop import HessianOperator, lanczos
from torchlinop.demo import digits_mlp
from torchlinop.testing.oracles import dense_hessian

problem = digits_mlp()  # a trained MLP, a list of batches, and loss_fn(model, batch)
model, loss_fn = problem.model, problem.loss_fn
optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
options = {"k": 3, "which": "LA", "tol": 1e-2}  # eigenvalues are as accurate as tol squared

# Eigenvectors move slowly. As a block, those of the epoch before may be good enough as they are:
# then one product of three columns, a single pass through the network, is all it takes.
start = None
products = {"cold": 0, "warm": 0}
followed = []
print("epoch     loss      three largest eigenvalues     products: cold   warm")
for epoch in range(10):
    H = HessianOperator(model, problem.batches, loss_fn)  # of the parameters as they are now
    cold = lanczos(H, **options)
    warm = lanczos(H, **options, v0=start)
    start = warm.eigenvectors
    followed.append(warm.eigenvalues)
    products["cold"] += cold.matvecs
    products["warm"] += warm.matvecs

    loss = float(loss_fn(model, problem.full_batch).detach())
    values = "".join(f"{value:10.4f}" for value in warm.eigenvalues.tolist())
    print(f"{epoch:5}{loss:9.4f}{values}{cold.matvecs:19}{warm.matvecs:7}")

    for batch in problem.batches:
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()

saved = 1 - products["warm"] / products["cold"]
print(f"\n{products['warm']} products in place of {products['cold']}: {saved:.0%} saved\n")

# %%
# At tol = 1e-6, eigenvectors would have to be right to six digits, and a start that is right to
# two saves little.
H = HessianOperator(model, problem.batches, loss_fn)
last = lanczos(H, **options, v0=start)
print(last, "\n")

# %%
# For comparison, the dense answer.
dense = dense_hessian(problem.full_loss, problem.parameters, rows_at_once=64)
exact = torch.linalg.eigvalsh(dense).flip(0)[:3]
print("for comparison: the dense answer")
print(exact)
print(f"largest relative error {((last.eigenvalues - exact) / exact).abs().max():.1e}")

# %%
# The picture, with ``pip install "torchlinop[plot]"``:
import matplotlib.pyplot as plt

figure, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
ax.plot(torch.stack(followed), "o-")
ax.set(xlabel="epoch", ylabel="eigenvalue", title="the three largest")
plt.show()
