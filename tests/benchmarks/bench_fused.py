"""What a cross-entropy Hessian product costs: the fused backends against the formula as written.

    python tests/benchmarks/bench_fused.py --out docs/benchmarks/fused.json
    python tests/benchmarks/bench_fused.py --device cuda --rows 4096 --classes 50257

All candidates take turns in one process; a repetition divides their times by that of the formula.
Buffers are peak bytes allocated during a call, in units of the logits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from torchlinop.losses import fused_cross_entropy
from torchlinop.losses.fused_cross_entropy import cross_entropy_hvp, cross_entropy_map

Product = Callable[[Tensor], Tensor]
FORMULA = "formula"
TOLERANCE = 1e-4  # relative error between candidates, in float32


def formula(logits: Tensor, weights: Tensor, u: Tensor) -> Tensor:
    """As one writes it, out of place."""
    return formula_with_p(logits.softmax(-1), weights, u)


def formula_with_p(p: Tensor, weights: Tensor, u: Tensor) -> Tensor:
    """The same with the softmax kept from before."""
    return weights.unsqueeze(-1) * (p * u - p * (p * u).sum(-1, keepdim=True))


def candidates(logits: Tensor, weights: Tensor) -> dict[str, Product]:
    """Single products as new memory, and products by what is kept, which overwrite their vector."""
    found: dict[str, Product] = {
        FORMULA: partial(formula, logits, weights),
        "formula, p kept": partial(formula_with_p, logits.softmax(-1), weights),
    }
    for backend in ("eager", "compile", *(["triton"] if logits.is_cuda else [])):
        found[backend] = partial(cross_entropy_hvp, logits, weights, backend=backend)
        found[f"{backend}, kept"] = cross_entropy_map(logits, weights, backend)
    return found


def seconds(product: Product, u: Tensor) -> float:
    v = u.clone()
    wait(u.device)
    start = time.perf_counter()
    product(v)
    wait(u.device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(product: Product, u: Tensor) -> int:
    """Allocated during a product above what was allocated before."""
    v = u.clone()
    if u.is_cuda:
        before = torch.cuda.memory_allocated(u.device)
        torch.cuda.reset_peak_memory_stats(u.device)
        product(v)
        return torch.cuda.max_memory_allocated(u.device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        product(v)
    records = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(records, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(sizes), default=0)


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    logits = 3 * torch.randn(arguments.rows, arguments.classes, device=device)
    u, weights = torch.randn_like(logits), torch.full(logits.shape[:1], 0.5, device=device)
    expected = formula(logits.double(), weights.double(), u.double())
    products = candidates(logits, weights)
    errors = {
        name: float((product(u.clone()) - expected).abs().max() / expected.abs().max())
        for name, product in products.items()
    }
    times: dict[str, list[float]] = {name: [] for name in products}
    for _ in range(arguments.repetitions):
        for name, product in products.items():
            times[name].append(seconds(product, u))
    return {
        name: {
            "times as fast as the formula": statistics.median(
                a / b for a, b in zip(times[FORMULA], times[name], strict=True)
            ),
            "milliseconds": 1000 * statistics.median(times[name]),
            "buffers": peak_bytes(product, u) / logits.nbytes,
            "error": errors[name],
        }
        for name, product in products.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--classes", type=int, default=20000)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--out", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = measure(arguments)
    print(f"{'':18}{'times as fast':>14}{'ms':>9}{'buffers':>9}{'error':>10}")
    for name, found in results.items():
        speed, milliseconds, buffers, error = found.values()
        print(f"{name:18}{speed:14.2f}{milliseconds:9.2f}{buffers:9.2f}{error:10.1e}")
        if not error <= TOLERANCE:
            raise SystemExit(f"{name} gives another product")
    facts = {**vars(arguments), "torch": torch.__version__}
    facts |= {"fell back to eager": sorted(fused_cross_entropy._failed)}
    if arguments.out:
        arguments.out.write_text(json.dumps({"facts": facts, "results": results}, default=str))


if __name__ == "__main__":
    main()
