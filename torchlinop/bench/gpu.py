"""``bench gpu``: the tests, then the stages, in limited time; a report is written after each."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from torchlinop.bench import gpu_tests
from torchlinop.bench.clock import Clock, shares
from torchlinop.bench.gpu_report import document, text
from torchlinop.bench.gpu_stages import STAGES, TESTS, TESTS_WEIGHT
from torchlinop.bench.machine import surroundings
from torchlinop.bench.records import append, read
from torchlinop.bench.supervisor import KILLED, run_limited, supervise
from torchlinop.bench.worker import BEGUN, ending
from torchlinop.errors import OptionError

CHOICES = (TESTS, *STAGES)
RESERVE = 5.0  # seconds for starting and for writing


@dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Raises:
        OptionError: no such device here, or a CPU without ``tiny``, or no time.
    """

    out: Path
    device: torch.device
    tiny: bool
    minutes: float
    only: Sequence[str]

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise OptionError(
                f"expected --minutes to be positive, got {self.minutes:g}; leave it out for 8"
            )
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise OptionError(
                f"expected a CUDA device, but torch {torch.__version__} finds none here; take a "
                "machine with one, or rehearse with --device cpu --tiny"
            )
        if self.device.type not in ("cuda", "cpu"):
            raise OptionError(f"expected --device cuda or cpu, got {self.device}")
        if self.device.type == "cpu" and not self.tiny:
            raise OptionError(
                "expected --tiny with --device cpu: the models are meant for a GPU, and on a CPU "
                "the command is a rehearsal; add --tiny"
            )

    @property
    def records(self) -> Path:
        return self.out / "gpu.jsonl"

    @property
    def log(self) -> Path:
        return self.out / "gpu.log"


def run(request: Request) -> None:
    """Write gpu.json and gpu.md, and beside them the records and the output of all processes."""
    total = Clock.of(60 * request.minutes - min(RESERVE, 6 * request.minutes))
    request.out.mkdir(parents=True, exist_ok=True)
    request.records.write_text("")
    request.log.write_text("")
    report = partial(write, request, surroundings(request.device))
    report()
    names = [name for name in STAGES if name in request.only]
    if TESTS in request.only:
        weights = [TESTS_WEIGHT, sum(STAGES[name].weight for name in names)]
        _test(request, next(shares(weights, total)))
        report()
    supervise(
        names,
        partial(_worker, request),
        records=request.records,
        log=request.log,
        total=total,
        report=report,
    )
    report()


def _worker(request: Request, names: Sequence[str], seconds: float) -> list[str]:
    """The command that runs these stages."""
    return [
        *(sys.executable, "-m", "torchlinop.bench", "worker", *names),
        *("--device", str(request.device), *(["--tiny"] if request.tiny else [])),
        *("--seconds", f"{seconds:g}", "--records", str(request.records.resolve())),
    ]


def _test(request: Request, clock: Clock) -> None:
    append(request.records, {"stage": TESTS, "event": BEGUN, "seconds": clock.left})
    start = time.monotonic()
    status, reason = _tested(request, clock)
    append(request.records, ending(TESTS, status, reason, time.monotonic() - start))


def _tested(request: Request, clock: Clock) -> tuple[str, str]:
    missing = gpu_tests.missing()
    if missing:
        return "skipped", missing
    ended = run_limited(
        gpu_tests.command(),
        request.log,
        lambda: clock.spent,
        cwd=gpu_tests.checkout(),
        environment=gpu_tests.environment(request.records.resolve()),
    )
    if ended is None:
        return KILLED, "it took too long; outcomes until then are kept"
    # 1: some failed, as their records say; 5: none was collected.
    return (
        ("done", "") if ended in (0, 1) else ("failed", f"pytest ended with {ended}, see gpu.log")
    )


def write(request: Request, facts: dict[str, Any]) -> None:
    """The reports of what is known by now."""
    found = document(read(request.records), facts, rehearsal=request.tiny)
    for name, content in (
        ("gpu.json", json.dumps(found, indent=1, allow_nan=False)),
        ("gpu.md", text(found)),
    ):
        partly = request.out / f"{name}.part"
        partly.write_text(content)
        partly.replace(request.out / name)  # never half a file
    for stage in [s for s in found["stages"] if s["status"] != "running"][-1:]:
        print(f"{stage['name']}: {stage['status']} {stage['reason']}", file=sys.stderr)
