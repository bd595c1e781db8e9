"""Solvers compared on one matrix: the same question, counted products, answers judged alike."""

import torchlinop.compare.solvers  # noqa: F401  # registers them
from torchlinop.compare.answer import Answer
from torchlinop.compare.comparison import Comparison
from torchlinop.compare.densities import DensityAnswer, compare_densities
from torchlinop.compare.eigenpairs import compare
from torchlinop.compare.history import History
from torchlinop.compare.registry import (
    Candidate,
    density_estimator,
    eigensolver,
    linear_solver,
    trace_estimator,
)
from torchlinop.compare.request import DensityRequest, Request, SolveRequest, TraceRequest
from torchlinop.compare.solves import Solution, compare_solves
from torchlinop.compare.traces import compare_traces

__all__ = [
    "Answer",
    "Candidate",
    "Comparison",
    "DensityAnswer",
    "DensityRequest",
    "History",
    "Request",
    "Solution",
    "SolveRequest",
    "TraceRequest",
    "compare",
    "compare_densities",
    "compare_solves",
    "compare_traces",
    "density_estimator",
    "eigensolver",
    "linear_solver",
    "trace_estimator",
]
