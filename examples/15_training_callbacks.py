"""
Watch training at the edge of stability
=======================================

The largest eigenvalues and the trace every fifty steps of a training, which is bit by bit the same
without being watched.
"""

import copy

import torch
from torch import nn

from torchlinop import HessianOperator
from torchlinop.callbacks import CurvatureWatch, TopEigenvalues, Trace
from torchlinop.testing.digits import digits
from torchlinop.testing.oracles import dense_hessian

X, labels = digits(torch.float32)  # of scikit-learn; 1,797 images of 8 x 8
X, Y = X[:600], nn.functional.one_hot(labels[:600], 10).float()
torch.manual_seed(0)
start = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
rate, steps = 0.15, 600


def loss_fn(model, batch):
    images, targets = batch
    return (model(images) - targets).square().sum(1).mean() / 2


def trained(watch=None):
    """Gradient descent on all data at once, from the same start."""
    model = copy.deepcopy(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for step in range(steps + 1):
        if watch is not None:
            watch(step, model)
        optimizer.zero_grad()
        loss_fn(model, (X, Y)).backward()
        optimizer.step()
    return model


# %%
# Whatever gives an operator for a model can be watched: a GGN, one layer's block, K-FAC.
watch = CurvatureWatch(
    lambda model: HessianOperator(model, [(X, Y)], loss_fn),
    [TopEigenvalues(k=3), Trace(32)],
    every=60,
)
watched = trained(watch)

# %%
# Gradient descent with a rate r is unstable where an eigenvalue is above 2 / r. Full-batch training
# goes there by itself, and stays (Cohen et al., Gradient descent on neural networks typically
# occurs at the edge of stability, ICLR 2021).
print(f"step    three largest eigenvalues    trace        (2 / rate = {2 / rate:.2f})")
for row in watch.history:
    values = "".join(f"{row[f'curvature/eigenvalue_{i}']:9.2f}" for i in (1, 2, 3))
    print(f"{row['step']:4}  {values}{row['curvature/trace']:11.1f}")

# %%
# The same without the watch.
plain = trained()
same = map(torch.equal, plain.parameters(), watched.parameters())
print(f"\nbit by bit the model that is trained without being watched: {all(same)}\n")

# %%
# For comparison, the dense answer at the start.
model = copy.deepcopy(start)
parameters = [*model.parameters()]
dense = dense_hessian(lambda: loss_fn(model, (X, Y)), parameters, rows_at_once=64)
print("for comparison: the dense answer at the start")
print(torch.linalg.eigvalsh(dense).flip(0)[:3], dense.trace())
print(watch.history[0])

# %%
# The picture, with ``pip install "torchlinop[plot]"``:
import matplotlib.pyplot as plt

figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
for i in (1, 2, 3):
    values = [row[f"curvature/eigenvalue_{i}"] for row in watch.history]
    ax.plot([row["step"] for row in watch.history], values, "o-", ms=3, label=f"eigenvalue {i}")
ax.axhline(2 / rate, color="k", lw=0.8, ls=":", label="2 / rate")
ax.set(xlabel="step", ylabel="eigenvalue")
ax.legend()
plt.show()
