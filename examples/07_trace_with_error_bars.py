"""The trace of a Hessian from 16 to 128 products: an estimate, and how wrong it may be."""

from torchlinop import HessianOperator, diagonal, extremal_eigenvalues, norm, trace
from torchlinop.demo import digits_mlp
from torchlinop.testing.oracles import dense_hessian

problem = digits_mlp()  # a trained MLP, a list of batches, and loss_fn(model, batch)
H = HessianOperator(problem.model, problem.batches, problem.loss_fn)
print(H, "\n")

# Three ways to spend the same products. Every estimate comes with its standard error.
for num_matvecs in (16, 32, 64, 128):
    for method in ("hutchinson", "hutch++", "xtrace"):
        print(trace(H, num_matvecs, method=method))
print()

# Or ask for an accuracy: products are doubled until two standard errors are within it.
print(trace(H, rtol=0.02), "\n")

# More of the same kind: norms, the ends of the spectrum, the diagonal.
print(norm(H, "fro"))
print(extremal_eigenvalues(H))
entries = diagonal(H, 64)
print(entries, "\n")

dense = dense_hessian(problem.full_loss, problem.parameters, rows_at_once=64)
error = (entries.estimate - dense.diagonal()).norm() / dense.diagonal().norm()
print("for comparison: the dense answer")
print(f"trace {dense.trace():.6f}, Frobenius norm {dense.norm():.6f}")
print(f"diagonal: 2-norm {dense.diagonal().norm():.4f}, error of the estimate {error:.1e} of it")
