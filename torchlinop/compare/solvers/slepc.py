"""SLEPc's Krylov-Schur, on a shell matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from torchlinop.adapters.scipy import as_linear_operator
from torchlinop.algorithms.result import optional
from torchlinop.compare.answer import Answer
from torchlinop.compare.registry import eigensolver
from torchlinop.compare.request import Request
from torchlinop.compare.solvers.scipy import start_array
from torchlinop.operators.base import CurvatureOperator


@eigensolver("slepc eps", budgeted=False, requires=("petsc4py", "slepc4py"))
def krylov_schur(A: CurvatureOperator, request: Request) -> Answer:
    """Its tolerance is relative to the eigenvalue; pairs that did not converge are left out."""
    petsc, slepc = optional("petsc4py.PETSc"), optional("slepc4py.SLEPc")
    n = A.size
    matrix = petsc.Mat().createPython((n, n), _Shell(A), comm=petsc.COMM_SELF)
    matrix.setUp()
    solver = slepc.EPS().create(comm=petsc.COMM_SELF)
    solver.setOperators(matrix)
    solver.setProblemType(slepc.EPS.ProblemType.HEP)
    ends = {"LA": "LARGEST_REAL", "SA": "SMALLEST_REAL", "LM": "LARGEST_MAGNITUDE"}
    solver.setWhichEigenpairs(getattr(slepc.EPS.Which, ends[request.which]))
    solver.setDimensions(request.k)
    solver.setTolerances(request.tol, request.budget)
    solver.setInitialSpace([_vector(petsc, start_array(A, request)[:, 0])])
    solver.solve()
    x = matrix.createVecRight()
    values, vectors = [], []
    for i in range(min(request.k, solver.getConverged())):
        values.append(solver.getEigenpair(i, x).real)
        vectors.append(torch.tensor(x.getArray().copy()))
    called = torch.ones(len(values), dtype=torch.bool)
    X = torch.stack(vectors, dim=1) if vectors else torch.zeros(n, 0, dtype=torch.float64)
    return Answer(torch.tensor(values, dtype=torch.float64), X, converged=called)


class _Shell:
    """The product, as PETSc calls it."""

    def __init__(self, A: CurvatureOperator) -> None:
        self._A = as_linear_operator(A)

    def mult(self, matrix: Any, x: Any, y: Any) -> None:
        y.setArray(self._A @ x.getArray(readonly=True).astype(np.float64))


def _vector(petsc: Any, array: Any) -> Any:
    vector = petsc.Vec().createSeq(len(array), comm=petsc.COMM_SELF)
    vector.setArray(array)
    return vector
