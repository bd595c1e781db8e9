"""Bytes that products take: peak and held, each candidate in a process of its own.

As a program it measures in its own process, and prints JSON:

    python tests/benchmarks/memory.py ggn vocabulary "torchlinop, kept" --device cuda
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from torchlinop.bench.candidates import MATRICES, UNITS, gradient
from torchlinop.bench.timing import wait
from torchlinop.bench.workloads import WORKLOADS


def memory(matrix: str, workload: str, candidate: str, device: str) -> dict[str, Any]:
    """What ``memory_here`` gives, in a fresh process; or ``failure``."""
    command = [sys.executable, __file__, matrix, workload, candidate, "--device", device]
    # Blocks of 64 KiB and more go back to the system when they are freed.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        return {"failure": (run.stderr.strip().splitlines() or ["no message"])[-1][:100]}
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def memory_here(matrix: str, workload: str, candidate: str, device: torch.device) -> dict[str, int]:
    """Bytes above the model, its data and vectors, and the bytes of the outputs to compare with.

    ``peak`` is that of the build and two products, ``product`` that of the second of them with
    all that is kept, ``held`` what is kept. A tiny product comes before, which imports and loads
    what the candidate needs.
    """
    w = WORKLOADS[workload](device)
    chosen = {**UNITS, **MATRICES[matrix].candidates}[candidate]
    V = torch.randn(w.size, chosen.columns, device=device)
    with torch.no_grad():
        outputs = w.outputs(w.model, w.batch).nbytes
    gradient(w.first(1))(V)
    chosen.build(w.first(1))(V)
    before = held_bytes(device)
    start_peak(device)
    product = chosen.build(w)
    product(V)
    wait(V.device)
    first = peak_bytes(device)
    start_peak(device)
    product(V)
    wait(V.device)
    second = peak_bytes(device)
    return {
        "peak": max(first, second) - before,
        "product": second - before,
        "held": held_bytes(device) - before,
        "outputs": outputs,
    }


def start_peak(device: torch.device) -> None:
    """The peak starts at what is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def held_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return status_bytes("VmRSS")


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return status_bytes("VmHWM")  # getrusage's ru_maxrss, but it can be reset


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("matrix", choices=MATRICES)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("candidate")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    found = memory_here(arguments.matrix, arguments.workload, arguments.candidate, device)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
