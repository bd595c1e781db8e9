"""Ten eigenpairs by ours and by peers: products, what was reached, what was claimed, and time.

    python tests/benchmarks/bench_solvers.py --out docs/benchmarks
    python tests/benchmarks/bench_solvers.py --quick

Every solver is given the same tol, which is relative to the eigenvalue, but absolute in SciPy's
lobpcg, and relative to norms in torch.lobpcg. Products are counted by the matrix itself; eigenvalue
errors, relative ones, are against the spectrum prescribed or a dense eigendecomposition; residuals
are by further products that do not count; a claim is a solver's own idea of its largest residual.
All relative to the eigenvalue, and the largest of all pairs. curvlinops has no solver of its own
for eigenpairs, and uses SciPy's.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
from report import device_name, table, version
from torch import Tensor

from torchlinop import (
    CountingOperator,
    CurvatureOperator,
    HessianOperator,
    MatrixOperator,
    as_linear_operator,
)
from torchlinop.algorithms.eigen_result import EigenResult
from torchlinop.algorithms.lanczos import lanczos
from torchlinop.algorithms.lobpcg import lobpcg
from torchlinop.algorithms.power_iteration import deflated_power_iteration
from torchlinop.demo import digits_mlp
from torchlinop.testing import spectra
from torchlinop.testing.gallery import with_spectrum
from torchlinop.testing.oracles import dense_hessian

HE_LONG = 100  # steps of hessian-eigenthings' Lanczos, which has no restart


@dataclass(frozen=True)
class Workload:
    """A matrix and its largest eigenvalues."""

    operator: CurvatureOperator
    exact: Tensor  # (k,)


@dataclass(frozen=True)
class Found:
    """The pairs a solver returned, and its claim."""

    eigenvalues: Tensor  # (k,)
    eigenvectors: Tensor  # (n, k)
    claimed: float = math.nan  # its largest relative residual; NaN if it makes no claim
    converged: int | None = None  # how many pairs it calls converged


@dataclass(frozen=True)
class Row:
    """One solver on one matrix."""

    matvecs: int
    matmats: int
    error: float  # the largest of an eigenvalue, relative to it
    residual: float  # the largest ‖A x − λ x‖ / |λ|, by products
    claimed: float
    converged: int | None
    seconds: float  # median
    failure: str = ""


Solver = Callable[[CurvatureOperator, int, float, int], Found]  # of A, k, tol, seed


# Matrices


def prescribed(eigenvalues: Tensor, k: int) -> Workload:
    A, _ = with_spectrum(eigenvalues)
    return Workload(MatrixOperator(A), eigenvalues.sort(descending=True).values[:k])


def digits(k: int) -> Workload:
    problem = digits_mlp()
    H = HessianOperator(problem.model, problem.batches, problem.loss_fn)
    dense = dense_hessian(problem.full_loss, problem.parameters, rows_at_once=64)
    return Workload(H, torch.linalg.eigvalsh(dense).flip(0)[:k])


def workloads(n: int, k: int) -> dict[str, Callable[[], Workload]]:
    return {
        f"as of a network, n = {n:,}": lambda: prescribed(spectra.neural(n), k),
        f"i^-2, n = {n:,}": lambda: prescribed(spectra.polynomial(n), k),
        f"i^-1/2, n = {n:,}": lambda: prescribed(spectra.polynomial(n, -0.5), k),
        "Hessian of an MLP on digits": lambda: digits(k),
    }


# Ours


def claim(result: EigenResult) -> Found:
    relative = result.residual_norms / result.eigenvalues.abs()
    count = int(result.converged.sum())
    return Found(result.eigenvalues, result.eigenvectors, float(relative.max()), count)


def our_lanczos(**options: Any) -> Solver:
    def solver(A: CurvatureOperator, k: int, tol: float, seed: int) -> Found:
        return claim(lanczos(A, k, which="LA", tol=tol, seed=seed, **options))

    return solver


def our_lobpcg(A: CurvatureOperator, k: int, tol: float, seed: int) -> Found:
    return claim(lobpcg(A, k, which="LA", tol=tol, seed=seed))


def our_power_iteration(A: CurvatureOperator, k: int, tol: float, seed: int) -> Found:
    return claim(deflated_power_iteration(A, k, max_iter=2000, tol=tol, seed=seed))


# Peers


def arpack(A: CurvatureOperator, k: int, tol: float, seed: int) -> Found:
    start = A.space.random(1, seed=seed)[:, 0].numpy()
    values, vectors = scipy.sparse.linalg.eigsh(
        as_linear_operator(A), k, which="LA", ncv=max(2 * k + 1, 20), tol=tol, v0=start
    )
    return descending(values, vectors)


def scipy_lobpcg(A: CurvatureOperator, k: int, tol: float, seed: int) -> Found:
    start = A.space.random(k, seed=seed).numpy()
    values, vectors, residuals = scipy.sparse.linalg.lobpcg(
        as_linear_operator(A), start, tol=tol, maxiter=1000, retResidualNormsHistory=True
    )
    found = descending(values, vectors)
    smallest = float(found.eigenvalues.abs().min())  # its tolerance is absolute
    return Found(found.eigenvalues, found.eigenvectors, float(np.max(residuals[-1])) / smallest)


def torch_lobpcg(A: CurvatureOperator, k: int, tol: float, seed: int) -> Found:
    start = A.space.random(k, seed=seed)
    values, vectors = torch.lobpcg(AsTensor(A), X=start, tol=tol, niter=1000, largest=True)
    return Found(values, vectors)


class AsTensor(Tensor):
    """An operator in the guise of a matrix without entries: torch.lobpcg takes tensors only."""

    operator: CurvatureOperator
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, A: CurvatureOperator) -> AsTensor:
        shape = (A.size, A.size)
        tensor = Tensor._make_wrapper_subclass(cls, shape, dtype=A.dtype, device=A.device)
        tensor.operator = A
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any, _: Any = None) -> Any:
        if function is torch.ops.aten.mm.default:
            # Autograd is off inside a dispatch, for this thread: products are taken in another one.
            with ThreadPoolExecutor(1) as other:
                return other.submit(arguments[0].operator.matmat, arguments[1]).result()
        return NotImplemented


def hessian_eigenthings(**options: Any) -> Solver:
    def solver(A: CurvatureOperator, k: int, tol: float, seed: int) -> Found:
        from hessian_eigenthings.algorithms.lanczos import lanczos as theirs
        from hessian_eigenthings.operators.base import LambdaOperator

        operator = LambdaOperator(A.matvec, A.size, dtype=A.dtype)
        result = theirs(operator, k=k, which="LA", tol=tol, seed=seed, **options)
        claimed = float((result.residuals / result.eigenvalues.abs()).max())
        vectors = result.eigenvectors.T
        return Found(result.eigenvalues, vectors, claimed, int(result.converged.sum()))

    return solver


def descending(values: np.ndarray, vectors: np.ndarray) -> Found:
    order = np.argsort(values)[::-1]
    return Found(torch.from_numpy(values[order].copy()), torch.from_numpy(vectors[:, order].copy()))


SOLVERS: dict[str, Solver] = {
    "lanczos": our_lanczos(),
    "lanczos, block_size=4": our_lanczos(block_size=4),
    "lanczos, verify=True": our_lanczos(verify=True),
    "lobpcg": our_lobpcg,
    "deflated_power_iteration": our_power_iteration,
    "SciPy eigsh": arpack,
    "SciPy lobpcg": scipy_lobpcg,
    "torch.lobpcg": torch_lobpcg,
    "hessian-eigenthings lanczos": hessian_eigenthings(),
    f"hessian-eigenthings lanczos, {HE_LONG} steps": hessian_eigenthings(max_iter=HE_LONG),
}


# Measurement


def measure(w: Workload, solver: Solver, k: int, tol: float, repetitions: int) -> Row:
    """The first seed's products and errors, and the median time of all."""
    try:
        runs = [run(w, solver, k, tol, seed) for seed in range(repetitions)]
    except (ImportError, RuntimeError, ValueError) as error:
        return failed(str(error).splitlines()[0][:80])
    found, counted, _ = runs[0]
    values, X = found.eigenvalues, found.eigenvectors / found.eigenvectors.norm(dim=0)
    residuals = (w.operator.matmat(X.contiguous()) - X * values).norm(dim=0)
    return Row(
        counted.matvecs,
        counted.matmats,
        float(((values - w.exact) / w.exact).abs().max()),
        float((residuals / values.abs()).max()),
        found.claimed,
        found.converged,
        statistics.median(seconds for _, _, seconds in runs),
    )


def run(
    w: Workload, solver: Solver, k: int, tol: float, seed: int
) -> tuple[Found, CountingOperator, float]:
    """What one seed found, its products and its seconds."""
    counted = CountingOperator(w.operator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is in the table: claims and errors
        started = time.perf_counter()
        found = solver(counted, k, tol, seed)
    return found, counted, time.perf_counter() - started


def failed(reason: str) -> Row:
    return Row(0, 0, math.nan, math.nan, math.nan, None, math.nan, f"fails: {reason}")


def markdown(rows: dict[str, dict[str, Row]], facts: dict[str, Any]) -> str:
    about = "; ".join(f"{key} {value}" for key, value in facts.items())
    lines = ["# Solvers, head to head", "", *(__doc__ or "").split("\n\n")[-1].splitlines(), about]
    header = ["solver", "products (calls)", "eigenvalue error", "residual", "claimed", "seconds"]
    for title, measured in rows.items():
        lines += ["", f"## {title}", ""]
        lines += table(header, [[name, *cells(row)] for name, row in measured.items()])
    return "\n".join(lines)


def cells(row: Row) -> list[str]:
    if row.failure:
        return [row.failure, "", "", "", ""]
    of = "" if row.converged is None else f", {row.converged} converged"
    claimed = "none" if math.isnan(row.claimed) else f"{row.claimed:.0e}{of}"
    calls = f"{row.matvecs} ({row.matmats})"
    return [calls, f"{row.error:.0e}", f"{row.residual:.0e}", claimed, f"{row.seconds:.2f}"]


def as_json(rows: dict[str, dict[str, Row]], facts: dict[str, Any]) -> str:
    plain = {title: {name: asdict(r) for name, r in found.items()} for title, found in rows.items()}
    return json.dumps({"facts": facts, "rows": plain}, indent=1)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=2000, help="n of prescribed spectra")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--tol", type=float, default=1e-6)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="n = 300, one repetition")
    parser.add_argument("--out", type=Path, help="directory for solvers.json and solvers.md")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    size, repetitions = (300, 1) if arguments.quick else (arguments.size, arguments.repetitions)
    rows: dict[str, dict[str, Row]] = {}
    for title, build in workloads(size, arguments.k).items():
        w = build()
        w.operator.matvec(w.operator.space.random(1)[:, 0])  # builds the graph, before the clock
        rows[title] = {}
        for name, solver in SOLVERS.items():
            print(f"{title}: {name} ...", file=sys.stderr)
            rows[title][name] = measure(w, solver, arguments.k, arguments.tol, repetitions)
    facts = {"k": arguments.k, "tol": arguments.tol, "repetitions": repetitions}
    facts |= {"device": device_name("cpu"), "threads": arguments.threads}
    facts |= {
        package: version(package)
        for package in ("torchlinop", "torch", "scipy", "hessian-eigenthings")
    }
    facts["command"] = " ".join(["python", "tests/benchmarks/bench_solvers.py", *sys.argv[1:]])
    text = markdown(rows, facts)
    print(text)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "solvers.json").write_text(as_json(rows, facts))
        (arguments.out / "solvers.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
