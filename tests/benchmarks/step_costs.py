"""What Lanczos costs beside its products: time, memory and reads of a step, n = 1,000,000."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from eigen_measures import silence
from eigen_peers import as_lambda
from pretend_device import Device
from solver_problems import Counted, Matrix, diagonal

from torchlinop.algorithms.lanczos import lanczos
from torchlinop.algorithms.tridiagonal import lanczos_tridiagonal

SHOWN = (10, 20, 30, 40, 50)  # stored vectors
K = 10
_NEVER = 1e-30  # a tolerance that is not reached: no step is saved by convergence
Run = Callable[[Counted, int], object]  # that many steps


def our_lanczos(A: Counted, steps: int) -> object:
    return lanczos(A.ours(), K, steps, which="LA", tol=_NEVER)


def our_whole_lanczos(A: Counted, steps: int) -> object:
    return lanczos(A.ours(), K, steps, which="LA", tol=_NEVER, ncv=steps)


def our_tridiagonal(A: Counted, steps: int) -> object:
    return lanczos_tridiagonal(A.ours(), torch.ones(A.size, dtype=A.dtype).to(A.device), steps)


def their_lanczos(A: Counted, steps: int) -> object:
    from hessian_eigenthings.algorithms.lanczos import lanczos as theirs

    return theirs(as_lambda(A), k=K, max_iter=steps, which="LA", seed=0)


def their_tridiagonal(A: Counted, steps: int) -> object:
    from hessian_eigenthings.algorithms.lanczos import lanczos_tridiagonal as theirs

    v0 = torch.ones(A.size, dtype=A.dtype).to(A.device)
    return theirs(as_lambda(A), v0, steps)


OURS, WHOLE, THEIRS = (
    "torchlinop lanczos", "torchlinop lanczos, ncv = steps", "hessian-eigenthings lanczos",
)  # fmt: skip
RUNS: dict[str, Run] = {
    WHOLE: our_whole_lanczos,
    OURS: our_lanczos,
    "torchlinop lanczos_tridiagonal": our_tridiagonal,
    THEIRS: their_lanczos,
    "hessian-eigenthings lanczos_tridiagonal": their_tridiagonal,
}


@dataclass(frozen=True)
class StepCosts:
    """Of one solver; the times are of all repetitions, which took turns with the others'."""

    seconds: tuple[float, ...]  # of a whole run, ascending
    overhead: dict[int, float]  # j: seconds between product j and the next, the least; no restarts
    times_reading: dict[int, float]  # j: that, in times reading 4 j vectors
    allocations: float  # vectors a step, with the result of the product, the most
    reads: tuple[int, int]  # by the host: the median of a step, and the sum of all

    @property
    def quartiles(self) -> tuple[float, float, float]:
        q1, median, q3 = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return q1, median, q3


@dataclass(frozen=True)
class Costs:
    """Of all solvers that run here."""

    solvers: dict[str, StepCosts]
    failures: dict[str, str]
    bandwidth: float  # bytes a second
    size: int
    steps: int


def measure(n: int, steps: int, repetitions: int) -> Costs:
    """Let all solvers take turns."""
    matrix = diagonal(n)
    failures: dict[str, str] = {}
    ready = {name: run for name, run in RUNS.items() if not failed(run, failures, name)}
    runs: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in ready}
    rate = 0.0
    for _ in range(repetitions):
        rate = max(rate, bandwidth(n * steps))
        for name, solver in ready.items():
            runs[name].append(timed(solver, matrix, steps))
    solvers = {
        name: step_costs(ready[name], found, rate, n, () if name == OURS else SHOWN)
        for name, found in runs.items()
    }
    return Costs(solvers, failures, rate, n, steps)


def failed(run: Run, failures: dict[str, str], name: str) -> bool:
    """Whether it cannot be run; warms up."""
    try:
        with silence():
            run(Counted(diagonal(1000)), 20)
    except (ImportError, RuntimeError) as error:
        failures[name] = str(error).splitlines()[0]
    return name in failures


def bandwidth(numbers: int) -> float:
    """Bytes a second at which a matrix as large as the basis is read, by a product with a vector.

    All threads take part, and what is read is not in a cache. The best of five.
    """
    V = torch.ones(50, max(1, numbers // 50))
    v = torch.ones(V.shape[1])
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        V @ v
        taken.append(time.perf_counter() - started)
    return V.nbytes / min(taken)


def timed(run: Run, matrix: Matrix, steps: int) -> tuple[float, list[float]]:
    """Seconds of all, and between the end of each product and the start of the next."""
    A = Counted(matrix)
    with silence():
        started = time.perf_counter()
        run(A, steps)
        seconds = time.perf_counter() - started
    ends, starts = [end for _, end in A.spans], [start for start, _ in A.spans]
    return seconds, [b - a for a, b in zip(ends, starts[1:], strict=False)]


def step_costs(
    run: Run, runs: list[tuple[float, list[float]]], rate: float, n: int, sizes: tuple[int, ...]
) -> StepCosts:
    gaps = [min(step) for step in zip(*(gaps for _, gaps in runs), strict=True)]
    # After product j, there are j vectors; the last step has no product after it.
    shown = {j: gaps[min(j, len(gaps)) - 1] for j in sizes if j <= len(gaps) + 1}
    allocations, reads = counted(run)
    return StepCosts(
        tuple(sorted(seconds for seconds, _ in runs)),
        shown,
        {j: seconds * rate / (4 * j * n * 4) for j, seconds in shown.items()},
        allocations,
        reads,
    )


def counted(run: Run, n: int = 20_000, steps: int = 50) -> tuple[float, tuple[int, int]]:
    """Vectors allocated in a step, the most, and reads by the host: the median, and all."""
    with silence(), Device(n, 4) as device:
        A = Counted(diagonal(n), device)
        run(A, steps)
    after, before = A.usages[1:], A.usages[:-1]
    allocated = [b.vectors - a.vectors for a, b in zip(before, after, strict=True)]
    reads = [b.reads - a.reads for a, b in zip(before, after, strict=True)]
    return max(allocated), (statistics.median_low(reads), sum(reads))
