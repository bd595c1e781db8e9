"""Solvers of this library and of others as functions ``(operator, request) -> answer``."""

from torchlinop.compare.solvers import ours  # noqa: I001  # registered in the order of tables
from torchlinop.compare.solvers import scipy, torch_lobpcg, hessian_eigenthings, pyhessian
from torchlinop.compare.solvers import primme, slepc, cupyx, dense
from torchlinop.compare.solvers import trace_estimators, density_estimators, linear_solvers

__all__ = [
    "cupyx",
    "dense",
    "density_estimators",
    "hessian_eigenthings",
    "linear_solvers",
    "ours",
    "primme",
    "pyhessian",
    "scipy",
    "slepc",
    "torch_lobpcg",
    "trace_estimators",
]
