"""The price of Hessian, GGN and empirical Fisher products in eager gradients, ours and peers'.

    python tests/benchmarks/bench_products.py --repetitions 9 --out docs/benchmarks
    python tests/benchmarks/bench_products.py --device cuda --out docs/benchmarks/cuda

All candidates of a matrix run in one process and take turns, so that they share what the machine
does besides. Each repetition divides their times by that of the gradient measured in it; the table
has the medians of these ratios and their range. Memory is measured in a fresh process per
candidate.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from memory import memory
from report import Results, Timed, Used, surroundings

from torchlinop.bench.candidates import GGN, MATRICES, UNIT
from torchlinop.bench.timing import measure
from torchlinop.bench.workloads import TIMED, WORKLOADS, Workload


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--matrices", nargs="+", choices=MATRICES, default=list(MATRICES))
    parser.add_argument("--workloads", nargs="+", choices=TIMED, default=list(TIMED))
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--out", type=Path, help="directory for products.json and products.md")
    return parser.parse_args()


def timed(arguments: argparse.Namespace, workloads: dict[str, Workload]) -> dict[str, Timed]:
    results: dict[str, Timed] = {}
    for matrix in arguments.matrices:
        results[matrix] = {}
        for name, w in workloads.items():
            print(f"timing {matrix}, {w.title} ...", file=sys.stderr)
            results[matrix][name] = measure(w, MATRICES[matrix], arguments.repetitions)
    return results


def used(arguments: argparse.Namespace) -> dict[str, Used]:
    print("measuring memory ...", file=sys.stderr)
    return {
        matrix: {
            w: {
                name: memory(matrix, w, name, arguments.device)
                for name in MATRICES[matrix].candidates
            }
            for w in arguments.workloads
        }
        for matrix in arguments.matrices
    }


def of_a_large_vocabulary(device: str) -> dict[str, dict[str, Any]]:
    """Bytes of the gradient and of single GGN products."""
    candidates = MATRICES[GGN].candidates
    singles = [name for name, candidate in candidates.items() if candidate.columns == 1]
    return {name: memory(GGN, "vocabulary", name, device) for name in [UNIT, *singles]}


def main() -> None:
    arguments = parsed()
    warnings.filterwarnings("ignore")  # of the peers and of torch
    torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, on a GPU too
    device = torch.device(arguments.device)
    workloads = {name: WORKLOADS[name](device) for name in arguments.workloads}
    with_logits = GGN in arguments.matrices and not arguments.no_memory
    results = Results(
        timed(arguments, workloads),
        {} if arguments.no_memory else used(arguments),
        of_a_large_vocabulary(arguments.device) if with_logits else {},
        {name: f"{w.title} (n={w.size:,})" for name, w in workloads.items()},
        surroundings(arguments.device, arguments.repetitions),
    )
    print(results.as_text())
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "products.md").write_text(results.as_text())
        (arguments.out / "products.json").write_text(results.as_json())


if __name__ == "__main__":
    main()
