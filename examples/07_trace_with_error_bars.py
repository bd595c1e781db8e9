"""
A trace, and how wrong it may be
================================

The trace of a Hessian from 16 to 128 products, by three methods, each with its standard error; and
the same question asked the other way round: how many products for two per cent?
"""

from torchlinop import HessianOperator, diagonal, extremal_eigenvalues, norm, trace
from torchlinop.demo import digits_mlp
from torchlinop.testing.oracles import dense_hessian

problem = digits_mlp()  # a trained MLP, a list of batches, and loss_fn(model, batch)
H = HessianOperator(problem.model, problem.batches, problem.loss_fn)
print(H, "\n")

# Three ways to spend the same products. Every estimate comes with its standard error.
found = {}
for num_matvecs in (16, 32, 64, 128):
    for method in ("hutchinson", "hutch++", "xtrace"):
        found[method, num_matvecs] = trace(H, num_matvecs, method=method)
        print(found[method, num_matvecs])

# %%
# Or ask for an accuracy: products are doubled until two standard errors are within it.
print(trace(H, rtol=0.02), "\n")

# %%
# More of the same kind: norms, the ends of the spectrum, the diagonal.
print(norm(H, "fro"))
print(extremal_eigenvalues(H))
entries = diagonal(H, 64)
print(entries, "\n")

# %%
# For comparison, the dense answer.
dense = dense_hessian(problem.full_loss, problem.parameters, rows_at_once=64)
error = (entries.estimate - dense.diagonal()).norm() / dense.diagonal().norm()
print("for comparison: the dense answer")
print(f"trace {dense.trace():.6f}, Frobenius norm {dense.norm():.6f}")
print(f"diagonal: 2-norm {dense.diagonal().norm():.4f}, error of the estimate {error:.1e} of it")

# %%
# The picture, with ``pip install "torchlinop[plot]"``:
import matplotlib.pyplot as plt

figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
for shift, method in zip((0.94, 1.0, 1.06), ("hutchinson", "hutch++", "xtrace"), strict=True):
    runs = [result for (name, _), result in found.items() if name == method]
    x = [result.matvecs * shift for result in runs]
    y = [float(result.estimate) for result in runs]
    ax.errorbar(x, y, [2 * float(r.stderr) for r in runs], fmt="o", capsize=3, label=method)
ax.axhline(float(dense.trace()), color="k", lw=0.8, label="dense")
ax.set(xscale="log", xlabel="products", ylabel="trace ± two standard errors")
ax.minorticks_off()
ax.set_xticks([16, 32, 64, 128], ["16", "32", "64", "128"])
ax.legend()
plt.show()
