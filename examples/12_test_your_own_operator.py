"""
Test your own operator and solver
=================================

A Hessian-vector product of our own, a careless one, and a solver of our own: what the assertions of
``torchlinop.testing`` catch, and how they say it.
"""

import torch

from torchlinop.demo import digits_mlp
from torchlinop.testing import (
    assert_deterministic,
    assert_eigenpairs,
    assert_equal_operators,
    assert_finite,
    assert_linear,
    assert_symmetric,
    problem,
)
from torchlinop.testing.oracles import dense_hessian

p = digits_mlp()  # a trained MLP on 1,797 digits, in eight batches of which the last is small
parameters = list(p.model.parameters())
n = sum(q.numel() for q in parameters)


def product_by(weights):
    """H v by double backward passes, batch by batch."""

    def product(v):
        Hv = torch.zeros_like(v)
        for batch, w in zip(p.batches, weights, strict=True):
            loss = w * p.loss_fn(p.model, batch)
            g = torch.autograd.grad(loss, parameters, create_graph=True)
            flat = torch.cat([part.flatten() for part in g])
            parts = torch.autograd.grad(flat @ v, parameters)
            Hv += torch.cat([part.flatten() for part in parts])
        return Hv

    return product


def verdict(assertion, *args, **options):
    """Print what the assertion says."""
    try:
        assertion(*args, **options)
        print(f"  ok      {assertion.__name__}")
    except AssertionError as error:
        print(f"  FAILED  {assertion.__name__}: {error}")


sizes = torch.tensor([float(len(y)) for _, y in p.batches], dtype=torch.float64)
mine = product_by(sizes / sizes.sum())
careless = product_by(torch.full((8,), 1 / 8, dtype=torch.float64))  # the mean of the batches

print("My product, of which I know nothing but that it should be a Hessian:")
for assertion in (assert_linear, assert_symmetric):
    verdict(assertion, mine, size=n)
verdict(assert_finite, mine, size=n, products=8)
verdict(assert_deterministic, mine, size=n, products=2)

# %%
# For comparison: the dense Hessian, by an oracle that shares no code with it.
H = dense_hessian(p.full_loss, parameters, rows_at_once=64)
print("\nAgainst the dense Hessian:")
verdict(assert_equal_operators, mine, H)
print("\nThe same, but for a mean over batches, of which one is small:")
verdict(assert_equal_operators, careless, H)


# %%
# A solver, on problems whose eigenvalues are known at any size.
def block_power(op, k, steps):
    """A solver: subspace iteration, which loses to clusters and to negative eigenvalues."""
    V = op.space.random(k)
    for _ in range(steps):
        V, _ = torch.linalg.qr(op.matmat(V))
    values, W = torch.linalg.eigh(V.T @ op.matmat(V))
    return values.flip(0), (V @ W).flip(1)


print("My solver, on problems whose eigenvalues are known:")
errors = {}
for name in ("exponential", "multiple", "clustered", "indefinite"):
    known = problem(name, 10_000)
    print(name)
    values, X = block_power(known.operator, k=4, steps=100)
    verdict(assert_eigenpairs, known.operator, values, X, rtol=1e-6, exact=known.eigenvalues)
    errors[name] = (values - known.wanted(4, "LA")).abs() / known.eigenvalues.abs().max()

# %%
# The picture, with ``pip install "torchlinop[plot]"``:
import matplotlib.pyplot as plt

figure, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
for name, error in errors.items():
    ax.semilogy(range(1, 5), error.clamp_min(1e-16), "o-", label=name)
ax.axhline(1e-6, color="k", lw=0.8, ls=":")
ax.set(xlabel="i", ylabel="error of my eigenvalue / ‖A‖", xticks=range(1, 5))
ax.legend()
plt.show()
