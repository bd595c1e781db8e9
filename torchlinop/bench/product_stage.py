"""Products against gradients of one workload: ours, as they are, compiled and captured, and peers'.

Every candidate is built by itself, compared with our eager product, timed by turns with the
gradient, and dropped, so that the memory of one is not held while another is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import torchlinop
from torchlinop.bench.candidates import (
    CL,
    GGN,
    HE,
    HESSIAN,
    OURS,
    Build,
    Product,
    by_curvlinops,
    gauss_newton,
    gauss_newton_by_eigenthings,
    gradient,
    hessian,
    hessian_by_eigenthings,
)
from torchlinop.bench.gpu_workloads import WORKLOADS
from torchlinop.bench.peaks import free, peak_above
from torchlinop.bench.records import Record
from torchlinop.bench.stages import Setting, Stage, failure_of
from torchlinop.bench.tables import middle
from torchlinop.bench.timing import seconds, wait
from torchlinop.bench.variants import COMPILED, EAGER, variants
from torchlinop.bench.workloads import Workload

BLOCK = 8  # columns
REPETITIONS = 7
SAMPLE_SECONDS = 0.02  # a sample repeats short products until it takes about as long
WARM = 3  # products before the clock starts: captures and compilations are in the first ones
AGREEMENT = 1e-3  # relative error that products of ours may have, in float32

COMPILED_CL = "curvlinops, torch.compile"

OPERATORS = {HESSIAN: torchlinop.HessianOperator, GGN: torchlinop.GGNOperator}
BUILDS: dict[str, Callable[..., Build]] = {HESSIAN: hessian, GGN: gauss_newton}
PEERS: dict[str, dict[str, Build]] = {
    HESSIAN: {HE: hessian_by_eigenthings, CL: by_curvlinops("HessianLinearOperator")},
    GGN: {HE: gauss_newton_by_eigenthings, CL: by_curvlinops("GGNLinearOperator")},
}


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    matrix: str
    candidate: str
    variant: str
    columns: int
    build: Build

    def about(self) -> dict[str, Any]:
        return {
            "matrix": self.matrix,
            "candidate": self.candidate,
            "variant": self.variant,
            "columns": self.columns,
        }


def eager_entries() -> Iterator[Entry]:
    """Ours and peers', single vectors and blocks."""
    for matrix, build in BUILDS.items():
        kept = build(linearization="keep")
        yield Entry(matrix, OURS, EAGER, 1, kept)
        yield Entry(matrix, OURS, EAGER, BLOCK, kept)
        for name, peer in PEERS[matrix].items():
            yield Entry(matrix, name, EAGER, 1, peer)
        yield Entry(matrix, CL, EAGER, BLOCK, PEERS[matrix][CL])


def compiled_entries() -> Iterator[Entry]:
    """What starts faster comes first; the eager product is what they are compared with."""
    for matrix, build in BUILDS.items():
        yield Entry(matrix, OURS, EAGER, 1, build(linearization="keep"))
    for name in COMPILED:
        for matrix, build in BUILDS.items():
            offered = variants(OPERATORS[matrix])
            if name in offered:
                compiled = build(linearization="keep", **offered[name])
                yield Entry(matrix, OURS, name, 1, compiled)
                yield Entry(matrix, OURS, name, BLOCK, compiled)
            else:
                yield Entry(matrix, OURS, name, 1, _not_offered(matrix, name))
    for matrix in BUILDS:
        yield Entry(matrix, COMPILED_CL, "compile", 1, _compiled(PEERS[matrix][CL]))


def _not_offered(matrix: str, keyword: str) -> Build:
    def build(w: Workload) -> Product:
        raise NotImplementedError(f"{OPERATORS[matrix].__name__} has no keyword {keyword}")

    return build


def _compiled(build: Build) -> Build:
    def compiled(w: Workload) -> Product:
        product: Product = torch.compile(build(w))
        return product

    return compiled


def stage(
    section: str, workload: str, weight: float, entries: Callable[[], Iterator[Entry]]
) -> Stage:
    """The stage that measures these entries on a workload."""

    def run(setting: Setting) -> Iterator[Record]:
        yield from measured(setting, workload, list(entries()))

    return Stage(section, workload, weight, run)


@dataclass(frozen=True)
class Subject:
    """A workload, and what all entries share."""

    workload: Workload
    V: Tensor  # (n, BLOCK)
    gradient: Product
    references: dict[str, Tensor]  # by matrix: A V[:, 0], of the first entry


def measured(setting: Setting, workload: str, entries: list[Entry]) -> Iterator[Record]:
    """A record for every entry, with what was measured or the reason why nothing was."""
    try:
        w = WORKLOADS[workload](setting.device, setting.tiny)
    except ImportError as error:
        yield {"workload": workload, "failure": f"not installed ({error.name})"}
        return
    about = {"workload": workload, "title": w.title, "parameters": w.size}
    torch.manual_seed(1)
    V = torch.randn(w.size, BLOCK, device=setting.device)
    subject = Subject(w, V, gradient(w), {})
    subject.gradient(V)
    for entry in entries:
        free(setting.device)
        yield {**about, **entry.about(), **_found(setting, subject, entry)}


def _found(setting: Setting, subject: Subject, entry: Entry) -> Mapping[str, Any]:
    if setting.clock.spent:
        return {"failure": "not measured: the time of this stage was spent"}
    if setting.device.type == "cpu" and entry.variant != EAGER:
        return {"failure": "not measured: needs a CUDA device"}
    try:
        return _prices(setting, subject, entry)
    except ImportError as error:
        return {"failure": f"not installed ({error.name})"}
    except Exception as error:  # of peers, compilers and the device, whatever they raise
        return {"failure": failure_of(error)}


def _prices(setting: Setting, subject: Subject, entry: Entry) -> Mapping[str, Any]:
    block = subject.V[:, : entry.columns].contiguous()
    with peak_above(setting.device) as peak:
        start = time.perf_counter()
        product = entry.build(subject.workload)
        Av = product(block)[:, 0].clone()
        for _ in range(0 if setting.tiny else WARM - 1):
            product(block)
        wait(block.device)
        started = time.perf_counter() - start
        most = peak()
    reference = subject.references.setdefault(entry.matrix, Av)
    error = float((Av - reference).norm() / reference.norm())
    if entry.candidate == OURS and not error <= AGREEMENT:
        return {"error": error, "failure": "gives another product than our eager one"}
    of_gradient, of_product = _by_turns(setting, subject.gradient, product, block)
    per_vector = [s / entry.columns for s in of_product]
    return {
        "error": error,
        "start_seconds": started,
        "peak_bytes": most,
        "gradient_seconds": of_gradient,
        "seconds_per_vector": per_vector,
        "gradients": middle([p / g for p, g in zip(per_vector, of_gradient, strict=True)]),
    }


def _by_turns(
    setting: Setting, unit: Product, product: Product, block: Tensor
) -> tuple[list[float], list[float]]:
    """Seconds of a call of each, interleaved."""
    pair = unit, product
    calls = [1 if setting.tiny else _calls(f, block) for f in pair]
    samples: tuple[list[float], list[float]] = [], []
    for _ in setting.clock.repetitions(3 if setting.tiny else REPETITIONS, least=3):
        for f, number, times in zip(pair, calls, samples, strict=True):
            times.append(seconds(f, block, number))
    return samples


def _calls(product: Product, block: Tensor) -> int:
    """In a sample."""
    return max(1, round(SAMPLE_SECONDS / seconds(product, block, 2)))
