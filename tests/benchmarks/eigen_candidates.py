"""The eigensolvers that are compared: ours as functions, and what can be measured of all."""

from __future__ import annotations

from dataclasses import dataclass

from eigen_peers import (
    arpack,
    arpack_of_curvlinops,
    pyhessian,
    scipy_lobpcg,
    their_lanczos,
    their_power_iteration,
    torch_lobpcg,
)
from eigen_requests import POWER_STEPS, Answer, Request, Solve
from solver_problems import Counted

from torchlinop.algorithms.eigen_result import EigenResult
from torchlinop.algorithms.lanczos import lanczos
from torchlinop.algorithms.lobpcg import lobpcg
from torchlinop.algorithms.power_iteration import deflated_power_iteration


@dataclass(frozen=True)
class Candidate:
    """A solver, and what of it can be measured."""

    solve: Solve
    which: str = "LA"  # power iteration finds the largest |λ|
    on_host: bool = False  # works in NumPy: the host takes part in every call
    exact_budget: bool = True  # else the best of several tolerances is taken
    budgets: bool = True  # whether it takes part in the comparison at equal products
    network_only: bool = False  # works on Hessians, and on nothing else


# Ours


def our_lanczos(*, ncv: int | str | None = None, block_size: int = 1) -> Solve:
    """``ncv="budget"`` holds every vector, so that there is no restart."""

    def solve(A: Counted, request: Request) -> Answer:
        v0 = request.start(A, block_size)
        vectors = request.budget if ncv == "budget" else ncv
        result = lanczos(
            A.ours(),
            request.k,
            request.budget,
            which="LA",
            tol=request.tol,
            seed=request.seed,
            ncv=vectors if vectors is None else int(vectors),
            block_size=block_size,
            v0=v0 if block_size > 1 else v0[:, 0],
        )
        return of_ours(result)

    return solve


def our_lobpcg(A: Counted, request: Request) -> Answer:
    result = lobpcg(
        A.ours(),
        request.k,
        request.budget,
        which="LA",
        tol=request.tol,
        seed=request.seed,
        v0=request.start(A, request.k),
    )
    return of_ours(result)


def our_power_iteration(A: Counted, request: Request) -> Answer:
    steps = POWER_STEPS if request.budget is None else request.budget // request.k
    result = deflated_power_iteration(
        A.ours(), request.k, steps, tol=request.tol, seed=request.seed
    )
    return of_ours(result)


def of_ours(result: EigenResult) -> Answer:
    return Answer(
        result.eigenvalues,
        result.eigenvectors,
        result.residual_norms,
        result.converged,
        result.error_bounds,
    )


OURS = "torchlinop lanczos"
HELD = "torchlinop lanczos, ncv = budget"
HE = "hessian-eigenthings"
CANDIDATES: dict[str, Candidate] = {
    OURS: Candidate(our_lanczos()),
    "torchlinop lanczos, ncv=40": Candidate(our_lanczos(ncv=40), budgets=False),
    "torchlinop lanczos, block_size=4": Candidate(our_lanczos(block_size=4)),
    "torchlinop lobpcg": Candidate(our_lobpcg),
    "torchlinop deflated power": Candidate(our_power_iteration, which="LM"),
    f"{HE} lanczos, default": Candidate(their_lanczos()),
    f"{HE} lanczos, 100 steps": Candidate(their_lanczos(100), budgets=False),
    f"{HE} lanczos, reorthogonalized": Candidate(their_lanczos(100, reorthogonalize=True)),
    f"{HE} deflated power": Candidate(their_power_iteration, which="LM"),
    "PyHessian eigenvalues": Candidate(pyhessian, which="LM"),
    "SciPy eigsh": Candidate(arpack(), on_host=True, exact_budget=False),
    "SciPy eigsh, ncv=40": Candidate(arpack(ncv=40), on_host=True, exact_budget=False),
    "SciPy lobpcg": Candidate(scipy_lobpcg, on_host=True),
    "torch.lobpcg": Candidate(torch_lobpcg),
    "curvlinops' Hessian, SciPy eigsh": Candidate(
        arpack_of_curvlinops, on_host=True, budgets=False, network_only=True
    ),
}
AT_EQUAL_PRODUCTS: dict[str, Candidate] = {
    HELD: Candidate(our_lanczos(ncv="budget")),
    **{name: c for name, c in CANDIDATES.items() if c.budgets},
}
