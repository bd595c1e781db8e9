"""The largest eigenpairs of one Hessian by SciPy through the host, by cupyx in place, and by ours.

All start from one vector and are judged by one tolerance on true residuals, relative to the
eigenvalue. What crosses the bus is read off a trace of one further run.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from scipy.sparse.linalg import eigsh as eigsh_of_scipy
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.dlpack import from_dlpack

import torchlinop
from torchlinop.bench.clock import Clock, TimeSpentError
from torchlinop.bench.gpu_workloads import WORKLOADS
from torchlinop.bench.peaks import free, peak_above
from torchlinop.bench.records import Record
from torchlinop.bench.stages import Setting, Stage, failure_of
from torchlinop.bench.timing import wait
from torchlinop.operators.base import CurvatureOperator

TOL = 1e-4
ROUNDS = 3
BUDGET = 3000  # products of one run
TRACED = (ProfilerActivity.CUDA,)

OURS = "lanczos of torchlinop"
SCIPY = "eigsh of SciPy, through the host"
CUPYX = "eigsh of cupyx, in place"
FACADE = "cupy_eigsh, cupyx asked for relative accuracy"


class Watched(CurvatureOperator):
    """The same matrix; its products are counted, and refused when the time is spent."""

    def __init__(self, operator: CurvatureOperator, clock: Clock) -> None:
        super().__init__(operator.space, description=[repr(operator)])
        self.operator = operator
        self.clock = clock
        self.columns = 0

    def _matmat(self, V: Tensor) -> Tensor:
        self.clock.refuse_late()
        self.columns += V.shape[1]
        return self.operator.matmat(V)


@dataclass(frozen=True)
class Request:
    """The k largest eigenpairs, from ``start``. ``scale`` is a guess at the smallest of them."""

    k: int
    start: Tensor
    scale: float = 1.0


@dataclass
class Runs:
    """What was measured of one way so far."""

    seconds: list[float] = field(default_factory=list)
    products: int = 0
    residual: float = 0.0
    value: float = 0.0
    peak: int | None = None
    bus: dict[str, int] | None = None
    no_bus: str = "no trace"
    failure: str = ""


Pairs = tuple[Tensor, Tensor]  # (k,) and (n, k), on the device
Way = Callable[[CurvatureOperator, Request], Pairs]


def by_lanczos(op: CurvatureOperator, request: Request) -> Pairs:
    """Ours."""
    found = torchlinop.lanczos(op, request.k, BUDGET, which="LA", tol=TOL, v0=request.start)
    return found.eigenvalues, found.eigenvectors


def by_scipy(op: CurvatureOperator, request: Request) -> Pairs:
    """ARPACK on the host."""
    A = torchlinop.as_linear_operator(op, max_matvecs=BUDGET)
    values, X = eigsh_of_scipy(A, request.k, which="LA", tol=TOL, v0=request.start.cpu().numpy())
    return torch.from_numpy(values.copy()), torch.from_numpy(X).to(op.device)


def by_cupyx(op: CurvatureOperator, request: Request) -> Pairs:
    """Called directly: it takes an absolute tolerance, so that it is told the scale."""
    solvers = importlib.import_module("cupyx.scipy.sparse.linalg")
    cupy = importlib.import_module("cupy")
    A = torchlinop.as_cupy_operator(op, max_matvecs=BUDGET)
    start = cupy.from_dlpack(request.start.clone())  # it is overwritten
    values, X = solvers.eigsh(A, request.k, which="LA", tol=TOL * request.scale, v0=start)
    return from_dlpack(values), from_dlpack(X)


def by_facade(op: CurvatureOperator, request: Request) -> Pairs:
    """Ours around cupyx."""
    found = torchlinop.cupy_eigsh(op, request.k, which="LA", tol=TOL, v0=request.start)
    return found.eigenvalues, found.eigenvectors


# The one that may take all the time of a round comes last.
WAYS: dict[str, Way] = {OURS: by_lanczos, CUPYX: by_cupyx, FACADE: by_facade, SCIPY: by_scipy}
OF_CUPY = (CUPYX, FACADE)


def stage(workload: str, weight: float) -> Stage:
    """The stage for the Hessian of a workload."""

    def run(setting: Setting) -> Iterator[Record]:
        yield from measured(setting, workload)

    return Stage("eigsh", workload, weight, run)


def measured(setting: Setting, workload: str) -> Iterator[Record]:
    """A record for every way, when all rounds are over."""
    w = WORKLOADS[workload](setting.device, setting.tiny)
    H = torchlinop.HessianOperator(w.model, [w.batch], w.loss, linearization="keep")
    request = Request(3 if setting.tiny else 10, H.space.random(1, seed=0)[:, 0])
    H.matmat(request.start[:, None])  # the graph is built, at nobody's expense
    runs = {name: Runs(failure=_missing(name, setting.device)) for name in WAYS}
    for _ in setting.clock.repetitions(1 + ROUNDS):  # the first one warms up
        for name, way in WAYS.items():
            if not runs[name].failure:
                _measure(runs[name], way, H, request, setting.clock)
            if runs[OURS].value:
                request = Request(request.k, request.start, abs(runs[OURS].value))
    for name, way in WAYS.items():
        if setting.device.type != "cuda" or runs[name].failure or setting.clock.spent:
            continue
        try:
            runs[name].bus = _bus_bytes(way, Watched(H, setting.clock), request)
        except Exception as error:  # late, or of the profiler; what was timed is not lost for it
            runs[name].no_bus = f"no trace: {type(error).__name__}: {error}"[:200]
    about = {
        "workload": workload,
        "title": w.title,
        "parameters": w.size,
        "k": request.k,
        "tolerance": TOL,
    }
    for name, run in runs.items():
        yield about | _record(name, run)


def _record(name: str, run: Runs) -> dict[str, Any]:
    if run.failure or not run.seconds:
        return {"way": name, "failure": run.failure or "the time of this stage was spent"}
    return {
        "way": name,
        "seconds": run.seconds[1:] or run.seconds,  # where there was time for one round alone
        "products": run.products,
        "residual": run.residual,
        "accurate": run.residual <= 2 * TOL,
        "peak_bytes": run.peak,
        "bus_bytes": run.bus,
        "bus_note": "" if run.bus else run.no_bus,
    }


def _missing(name: str, device: torch.device) -> str:
    if name in OF_CUPY and device.type != "cuda":
        return "not measured: needs a CUDA device"
    if name in OF_CUPY and importlib.util.find_spec("cupyx") is None:
        return "not installed (cupyx)"
    return ""


def _measure(run: Runs, way: Way, H: CurvatureOperator, request: Request, clock: Clock) -> None:
    op = Watched(H, clock)
    free(H.device)
    try:
        with peak_above(H.device) as peak, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wait(H.device)
            start = time.perf_counter()
            values, X = way(op, request)
            wait(H.device)
            seconds = time.perf_counter() - start
            run.peak = peak()
    except TimeSpentError:
        run.failure = "" if run.seconds else "the time of this stage was spent"
        return
    except Exception as error:  # of solvers, whatever they raise
        run.failure = failure_of(error)
        return
    values = values.to(H.device, H.dtype)
    run.products, run.value = op.columns, float(values.min())
    run.residual = float(((H.matmat(X) - X * values).norm(dim=0) / values.abs()).max())
    run.seconds.append(seconds)


def _bus_bytes(way: Way, op: Watched, request: Request) -> dict[str, int]:
    """Bytes to the device and to the host during a run."""
    with warnings.catch_warnings(), profile(activities=TRACED) as traced:
        warnings.simplefilter("ignore")
        way(op, request)
        wait(op.device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        traced.export_chrome_trace(str(path))
        return copied_bytes(json.loads(path.read_text()))


def copied_bytes(trace: dict[str, Any]) -> dict[str, int]:
    """Of a trace of the profiler: what was copied between host and device."""
    copies = [e for e in trace["traceEvents"] if e.get("cat") == "gpu_memcpy"]
    return {
        direction: sum(int(e["args"]["bytes"]) for e in copies if direction in e["name"])
        for direction in ("HtoD", "DtoH")
    }
