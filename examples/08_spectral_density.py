"""
The density of a spectrum
=========================

The Hessian of a classifier on ten classes: a bulk around zero, and nine outliers. With a path as
argument, the picture is saved there.
"""

import sys

import torch

from torchlinop import HessianOperator, spectral_density
from torchlinop.algorithms.spectral_density import smoothed
from torchlinop.demo import digits_mlp
from torchlinop.testing.oracles import dense_hessian

problem = digits_mlp(steps=30)  # 10 classes; longer training moves outliers into the bulk
H = HessianOperator(problem.model, problem.batches, problem.loss_fn)

# Eight probes, eighty products each; all probes advance together, and no basis is stored.
result = spectral_density(H, num_runs=8, lanczos_steps=80)
print(result, "\n")
values = result.outliers.values.flip(0)  # what stands aside of the bulk, largest first
print("outliers:", *(f"{value:.3f}" for value in values.tolist()))
largest_gap = int((values[:-1] / values[1:]).argmax()) + 1
print(f"the largest gap comes after {largest_gap}, for ten classes\n")

# %%
# What was multiplied is kept: other widths, scales and functions cost no further product.
quadrature = result.quadrature
fine = quadrature.density(torch.linspace(-0.1, 0.1, 5), sigma=0.01)
print("density near zero:", *(f"{d:.2f} ± {e:.2f}" for d, e in zip(*fine, strict=True)))
print("trace:", quadrature.spectral_sum(lambda t: t))

# %%
# On logarithmic axes: how many eigenvalues there are of each size, from the bulk's zeros on.
exponents = torch.linspace(-5, 1, 121, dtype=torch.float64)
below, above = (quadrature.log_density(exponents, 0.3, sign=s).value for s in (-1, 1))
print("\nlog10 |λ|     λ < 0     λ > 0   (fraction of eigenvalues per decade)")
for x, negative, positive in zip(exponents[::20], below[::20], above[::20], strict=True):
    print(f"{round(float(x)):9} {negative:9.4f} {positive:9.4f}")

# %%
# For comparison, the dense answer.
exact = torch.linalg.eigvalsh(dense_hessian(problem.full_loss, problem.parameters, rows_at_once=64))
print("\nfor comparison: the dense answer")
print("largest: ", *(f"{value:.3f}" for value in exact[-10:].flip(0).tolist()))
print(f"trace:    {float(exact.sum()):.4f}")
print(f"negative: {float((exact < -1e-10).double().mean()):.2%} of the eigenvalues")

# %%
# The picture, with ``pip install "torchlinop[plot]"``:
import matplotlib.pyplot as plt

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
smoothed(quadrature, sigma=0.02).plot(left)
top = exact[-9:]
left.plot(top, torch.full_like(top, 1.0), "v", color="C1", label="dense: the nine largest of 1,810")
left.set_title("ten classes: a bulk, and nine outliers")
left.legend()
for density, label in ((above, "λ > 0"), (below, "λ < 0")):
    right.loglog(10**exponents, density.clamp_min(1e-4), label=label)
right.set(xlabel="|λ|", ylabel="fraction of eigenvalues per decade", title="the bulk, by sign")
right.legend()
if len(sys.argv) > 1:
    figure.savefig(sys.argv[1], dpi=110)
plt.show()
