"""Eigenpairs, traces and spectral densities by ours and by others: cost, error, and claims.

    python tests/benchmarks/bench_solvers.py --out docs/benchmarks/solvers
    python tests/benchmarks/bench_solvers.py --quick

About eight minutes on two quiet cores. What is not installed is a row that says so; for those of
PyHessian, ``pip install pyhessian``. The report explains every number.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import density_measures
import eigen_measures
import step_costs
import torch
from eigen_candidates import AT_EQUAL_PRODUCTS, CANDIDATES, OURS
from eigen_requests import Request
from report import device_name, version
from solver_problems import Counted, eigenvalue_problems, trace_problems
from solver_report import Results

from torchlinop import CurvatureOperator, trace
from torchlinop.algorithms.trace_result import TraceResult
from torchlinop.compare import Candidate, TraceRequest, compare_traces, trace_estimator

SECTIONS = ("pairs", "steps", "traces", "densities")


def xnystrace(A: CurvatureOperator, request: TraceRequest) -> TraceResult:
    """For positive semidefinite matrices; of others it says so."""
    return trace(A, request.num_matvecs, method="xnystrace", seed=request.seed)


TRACE_ESTIMATORS = (*trace_estimator.names, Candidate("torchlinop xnystrace", xnystrace))


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    matrices: tuple[str, ...] = ("poly", "slow", "cluster", "nn", "nnhard", "digits")
    n: int = 4000  # of prescribed spectra
    k: int = 10  # eigenpairs
    repetitions: int = 3  # seeds of eigensolvers
    budgets: tuple[int, ...] = (20, 40, 60, 100)
    vectors: int = 1_000_000  # entries of a vector, for the cost of steps
    steps: int = 50
    turns: int = 7
    n_of_traces: int = 1000
    trace_products: tuple[int, ...] = (60, 120)
    trace_seeds: int = 50
    quadratures: tuple[tuple[int, int], ...] = ((10, 80), (5, 40))  # probes, steps
    density_seeds: int = 3


QUICK = Sizes(
    matrices=("nn", "digits"),
    n=400,
    k=5,
    repetitions=1,
    budgets=(20, 40),
    vectors=50_000,
    steps=20,
    turns=3,
    n_of_traces=200,
    trace_products=(30,),
    trace_seeds=4,
    quadratures=((2, 20),),
    density_seeds=1,
)


def measure_pairs(results: Results, sizes: Sizes) -> None:
    problems, request = eigenvalue_problems(sizes.n), Request(sizes.k)
    for title in sizes.matrices:
        matrix = problems[title]()
        eigen_measures.run(matrix, CANDIDATES[OURS], request)  # warms up
        full = f"{title}, n = {matrix.size:,}"
        results.pairs[full], results.budgets[full] = {}, {}
        for name, candidate in CANDIDATES.items():
            if matrix.network is None and candidate.network_only:
                continue
            say(full, name)
            row = eigen_measures.measure(matrix, candidate, request, sizes.repetitions)
            results.pairs[full][name] = row
        for name, candidate in AT_EQUAL_PRODUCTS.items():
            say(full, name, "at equal products")
            results.budgets[full][name] = {
                p: eigen_measures.error_within(matrix, candidate, request, p, sizes.repetitions)
                for p in sizes.budgets
            }


def measure_steps(results: Results, sizes: Sizes) -> None:
    say("steps")
    results.costs = step_costs.measure(sizes.vectors, sizes.steps, sizes.turns)


def measure_traces(results: Results, sizes: Sizes) -> None:
    for title, matrix in trace_problems(sizes.n_of_traces).items():
        for products in sizes.trace_products:
            say("trace", title, f"{products}")
            found = compare_traces(
                {title: Counted(matrix).ours()},
                products,
                TRACE_ESTIMATORS,
                seeds=sizes.trace_seeds,
                truth=matrix.eigenvalues,
                histories=False,
            )
            results.traces[f"{title}, {products}"] = {row.solver: row for row in found.rows}


def measure_densities(results: Results, sizes: Sizes) -> None:
    for title, matrix in trace_problems(sizes.n_of_traces).items():
        for probes, steps in sizes.quadratures:
            say("density", title, f"{probes} x {steps}")
            results.densities[f"{title}, {probes} x {steps}"] = {
                name: density_measures.measure(matrix, density, probes, steps, sizes.density_seeds)
                for name, density in density_measures.DENSITIES.items()
            }


MEASURES = dict(
    zip(SECTIONS, (measure_pairs, measure_steps, measure_traces, measure_densities), strict=True)
)
_STARTED = time.perf_counter()


def say(*what: str) -> None:
    print(f"{time.perf_counter() - _STARTED:6.0f} s  {', '.join(what)}", file=sys.stderr)


def facts(sizes: Sizes) -> dict[str, Any]:
    packages = ("torchlinop", "torch", "scipy", "hessian-eigenthings", "curvlinops-for-pytorch")
    return {
        "device": device_name("cpu"),
        "threads": torch.get_num_threads(),
        "k": sizes.k,
        "seeds of eigensolvers": sizes.repetitions,
        "seeds of traces": sizes.trace_seeds,
        "seeds of densities": sizes.density_seeds,
        **{package: version(package) for package in (*packages, "pyhessian")},
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "tests/benchmarks/bench_solvers.py", *sys.argv[1:]]),
    }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--vectors", type=int, help="entries of a vector, for the cost of steps")
    parser.add_argument("--quick", action="store_true", help="small sizes, under a minute")
    parser.add_argument("--out", type=Path, help="directory for solvers.json and solvers.md")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    sizes = QUICK if arguments.quick else Sizes()
    if arguments.vectors:
        sizes = replace(sizes, vectors=arguments.vectors)
    results = Results(facts(sizes))
    for section in arguments.sections:
        MEASURES[section](results, sizes)
    results.facts["minutes"] = round((time.perf_counter() - _STARTED) / 60, 1)
    text = results.as_text()
    print(text)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "solvers.json").write_text(results.as_json() + "\n")
        (arguments.out / "solvers.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
