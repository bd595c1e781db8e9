"""Seconds per vector: candidates that are warm and give the right product take turns."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlinop.bench.candidates import UNITS, Candidate, Matrix, Product
from torchlinop.bench.workloads import Workload

TOLERANCE = 1e-4  # relative error between candidates of ours, in float32
SAMPLE_SECONDS = 0.05  # a sample repeats short products until it takes about as long


@dataclass(frozen=True)
class Measurement:
    """Seconds per vector of every repetition, or the reason why there are none."""

    seconds: tuple[float, ...] = ()
    error: float = 0.0  # relative to the first candidate of the same matrix
    notes: tuple[str, ...] = ()  # what the library logged: memory of the graphs, column chunk
    failure: str = ""


@dataclass(frozen=True)
class Ready:
    """A candidate that is built and warm."""

    product: Product
    V: Tensor
    calls: int  # in one sample
    error: float
    notes: tuple[str, ...]

    def seconds_per_vector(self) -> float:
        return seconds(self.product, self.V, self.calls) / self.V.shape[1]


def measure(w: Workload, matrix: Matrix, repetitions: int) -> dict[str, Measurement]:
    """Warm everything up, then let all candidates take turns."""
    torch.manual_seed(1)
    V = torch.randn(w.size, 16, device=w.batch[0].device)
    failures: dict[str, Measurement] = {}
    ready: dict[str, Ready] = {}
    references: dict[str, Tensor] = {}
    for name, candidate in {**UNITS, **matrix.candidates}.items():
        try:
            ready[name] = prepare(name, candidate, w, V, references)
        except ImportError as error:
            failures[name] = Measurement(failure=f"not installed ({error.name})")
        except (RuntimeError, NotImplementedError) as error:
            failures[name] = Measurement(failure=f"fails: {str(error).splitlines()[0][:100]}")
    samples: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(repetitions):
        for name, warm in ready.items():
            samples[name].append(warm.seconds_per_vector())
    measured = {
        name: Measurement(tuple(samples[name]), r.error, r.notes) for name, r in ready.items()
    }
    return measured | failures


def prepare(
    name: str, candidate: Candidate, w: Workload, V: Tensor, references: dict[str, Tensor]
) -> Ready:
    """Build it, multiply, compare with the product of the first candidate that is its equal."""
    block = V[:, : candidate.columns].contiguous()
    with logged("torchlinop") as notes:
        product = candidate.build(w)
        AV = product(block)
    error = 0.0
    if name not in UNITS:
        error = disagreement(name, AV[:, 0], references.setdefault(candidate.equals, AV[:, 0]))
    calls = max(1, round(SAMPLE_SECONDS / seconds(product, block, 2)))
    return Ready(product, block, calls, error, tuple(notes))


def disagreement(name: str, Av: Tensor, reference: Tensor) -> float:
    """The relative error. Our products must agree; a peer's error is shown.

    curvlinops 3.0.1 takes Hessians as jvp(jacrev), which torch 2.15 gets wrong for the weights of
    a layer norm (jvp(grad) is right): its work is the same, so that it is timed all the same.
    """
    error = float((Av - reference).norm() / reference.norm())
    if name.startswith("torchlinop") and not error <= TOLERANCE:
        raise SystemExit(f"{name} gives another product: relative error {error:.2g}")
    return error


def seconds(product: Product, V: Tensor, calls: int) -> float:
    """Of one call, averaged; by events of the device where there is one."""
    wait(V.device)
    if V.is_cuda:
        return _seconds_of_device(product, V, calls)
    start = time.perf_counter()
    for _ in range(calls):
        product(V)
    return (time.perf_counter() - start) / calls


def _seconds_of_device(product: Product, V: Tensor, calls: int) -> float:
    with torch.cuda.device(V.device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            product(V)
        end.record()
        end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1000 / calls


def wait(device: torch.device) -> None:
    """Until it has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def logged(logger: str) -> Iterator[list[str]]:
    """The messages that ``logger`` gives inside the ``with``."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    source = logging.getLogger(logger)
    level = source.level
    source.addHandler(handler)
    source.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        source.removeHandler(handler)
        source.setLevel(level)
