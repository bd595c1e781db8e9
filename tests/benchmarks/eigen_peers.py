"""Eigensolvers of other libraries, as functions ``(products, request) -> answer``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
from eigen_requests import POWER_STEPS, Answer, Request, Solve
from solver_problems import Counted
from torch import Tensor

# hessian-eigenthings


def their_lanczos(steps: int | None = None, *, reorthogonalize: bool | None = None) -> Solve:
    def solve(A: Counted, request: Request) -> Answer:
        from hessian_eigenthings.algorithms.lanczos import lanczos as theirs

        result = theirs(
            as_lambda(A),
            k=request.k,
            max_iter=request.budget or steps,
            tol=request.tol,
            reorthogonalize=reorthogonalize,
            which="LA",
            seed=request.seed,
        )
        return of_theirs(result)

    return solve


def their_power_iteration(A: Counted, request: Request) -> Answer:
    from hessian_eigenthings.algorithms.power_iteration import deflated_power_iteration as theirs

    steps = POWER_STEPS if request.budget is None else request.budget // request.k
    result = theirs(as_lambda(A), k=request.k, max_iter=steps, tol=request.tol, seed=request.seed)
    return of_theirs(result)


def as_lambda(A: Counted) -> Any:
    from hessian_eigenthings.operators.base import LambdaOperator

    return LambdaOperator(A.vector, A.size, device=A.device, dtype=A.dtype)


def of_theirs(result: Any) -> Answer:
    return Answer(result.eigenvalues, result.eigenvectors.T, result.residuals, result.converged)


# PyHessian


def pyhessian(A: Counted, request: Request) -> Answer:
    steps = POWER_STEPS if request.budget is None else request.budget // request.k
    with in_double_precision(request.seed):
        values, vectors = as_pyhessian(A).eigenvalues(
            maxIter=steps, tol=request.tol, top_n=request.k
        )
    X = torch.stack([v[0] for v in vectors], dim=1)
    return Answer(torch.tensor(values, dtype=A.dtype, device=A.device), X)


def as_pyhessian(A: Counted) -> Any:
    """Its class, with products of A in place of those of a model's Hessian."""
    from pyhessian import hessian

    class Explicit(hessian):  # type: ignore[misc]
        def __init__(self) -> None:
            self.model = torch.nn.Module()
            self.full_dataset, self.device = True, A.device
            self.params = [torch.zeros(A.size, dtype=A.dtype, device=A.device)]

        def dataloader_hv_product(self, v: list[Tensor]) -> tuple[float, list[Tensor]]:
            Hv = A.vector(v[0])
            return (Hv * v[0]).sum().cpu().item(), [Hv]

    return Explicit()


@contextlib.contextmanager
def in_double_precision(seed: int) -> Iterator[None]:
    """For libraries that draw from the global generator, in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


# SciPy


def arpack(*, ncv: int | None = None) -> Solve:
    def solve(A: Counted, request: Request) -> Answer:
        return by_arpack(A.scipy(), A, request, ncv)

    return solve


def arpack_of_curvlinops(A: Counted, request: Request) -> Answer:
    """curvlinops has no eigensolver: its Hessian in SciPy's."""
    import curvlinops

    problem = A.matrix.network
    assert problem is not None
    H = curvlinops.HessianLinearOperator(
        problem.model,
        torch.nn.CrossEntropyLoss(),
        list(problem.model.parameters()),
        [problem.full_batch],
        check_deterministic=False,
    ).to_scipy(np.float64)

    def matvec(v: np.ndarray) -> np.ndarray:
        A.columns += 1
        began = time.perf_counter()
        Hv = np.asarray(H @ v)
        A.spans.append((began, time.perf_counter()))
        return Hv

    counted = scipy.sparse.linalg.LinearOperator(A.shape, matvec=matvec, dtype=np.float64)
    return by_arpack(counted, A, request, None)


def by_arpack(operator: Any, A: Counted, request: Request, ncv: int | None) -> Answer:
    """It raises unless all pairs converged, so that returning is a claim."""
    values, vectors = scipy.sparse.linalg.eigsh(
        operator,
        request.k,
        which="LA",
        ncv=ncv,
        tol=request.tol,
        v0=request.start(A)[:, 0].numpy(),
        maxiter=1000,
    )
    answer = Answer(torch.from_numpy(values), torch.from_numpy(vectors))
    return replace(answer, converged=torch.ones(request.k, dtype=torch.bool))


def scipy_lobpcg(A: Counted, request: Request) -> Answer:
    """Its tolerance is absolute. An iteration takes k products, and three blocks come on top."""
    steps = 200 if request.budget is None else affordable(request, 3, 1)
    values, vectors, residuals = scipy.sparse.linalg.lobpcg(
        A.scipy(),
        np.ascontiguousarray(request.start(A, request.k).numpy()),
        tol=request.tol,
        maxiter=steps,
        retResidualNormsHistory=True,
    )
    return Answer(*(torch.from_numpy(np.array(x)) for x in (values, vectors, residuals[-1])))


def affordable(request: Request, first: int, each: int) -> int:
    """Iterations that fit the budget, of so many blocks of k products."""
    blocks = (request.budget or 0) // request.k
    steps = (blocks - first) // each
    if steps < 1:
        raise ValueError(f"a budget of {request.budget} products is less than one iteration")
    return steps


# PyTorch


def torch_lobpcg(A: Counted, request: Request) -> Answer:
    """An iteration takes 4 k products, less two blocks in all."""
    steps = 200 if request.budget is None else affordable(request, -2, 4)
    start = request.start(A, request.k)
    values, vectors = torch.lobpcg(AsTensor(A), X=start, tol=request.tol, niter=steps, largest=True)
    return Answer(values, vectors)


class AsTensor(Tensor):
    """An operator in the guise of a matrix without entries: torch.lobpcg takes tensors only."""

    operator: Counted
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, A: Counted) -> AsTensor:
        tensor = Tensor._make_wrapper_subclass(cls, A.shape, dtype=A.dtype, device=A.device)
        tensor.operator = A
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any, _: Any = None) -> Any:
        if function is torch.ops.aten.mm.default:
            # Autograd is off inside a dispatch, for this thread: products are taken in another one.
            with ThreadPoolExecutor(1) as other:
                return other.submit(arguments[0].operator.block, arguments[1]).result()
        return NotImplemented
