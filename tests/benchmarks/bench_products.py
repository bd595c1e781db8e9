"""The price of a Hessian product in eager gradients: torchlinop against its peers.

    python tests/benchmarks/bench_products.py --out docs/benchmarks
    python tests/benchmarks/bench_products.py --device cuda --out docs/benchmarks/cuda

All candidates run in one process and take turns, so that they share what the machine does
besides. Each repetition divides their times by that of the gradient measured in it; the table has
the medians of these ratios and their range. Memory is measured in a fresh process per candidate.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import WORKLOADS, Workload

import torchlinop

MIB = 2**20
TOLERANCE = 1e-4  # relative error between candidates, in float32
SAMPLE_SECONDS = 0.05  # a sample repeats short products until it takes about as long
NOISE = 1.05  # ratios between candidates below this are within the noise of a shared machine

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Candidate:
    """Something that is timed: ``build(workload)`` gives a product of blocks (n, columns)."""

    build: Callable[[Workload], Product]
    columns: int = 1


@dataclass(frozen=True)
class Measurement:
    """Seconds per vector of every repetition, or the reason why there are none."""

    seconds: tuple[float, ...] = ()
    error: float = 0.0  # relative to the first product
    notes: tuple[str, ...] = ()  # what the library logged: memory of the graphs, column chunk
    failure: str = ""


# Candidates


def ours(**options: Any) -> Callable[[Workload], Product]:
    def build(w: Workload) -> Product:
        return torchlinop.HessianOperator(w.model, [w.batch], w.loss, **options).matmat

    return build


def hessian_eigenthings(w: Workload) -> Product:
    import hessian_eigenthings as peer

    operator = peer.HessianOperator(w.model, [w.batch], w.loss)

    def product(V: Tensor) -> Tensor:
        with second_derivatives(w):
            return operator.matvec(V[:, 0])[:, None]

    return product


def curvlinops(w: Workload) -> Product:
    import curvlinops as peer

    operator = peer.HessianLinearOperator(
        w.model, nn.CrossEntropyLoss(), w.parameters, [w.batch], check_deterministic=False
    )

    def product(V: Tensor) -> Tensor:
        with second_derivatives(w):
            return operator @ V if V.shape[1] > 1 else (operator @ V[:, 0])[:, None]

    return product


def second_derivatives(w: Workload) -> AbstractContextManager[Any]:
    """The one attention kernel that has second derivatives; torchlinop chooses it by itself."""
    return sdpa_kernel(SDPBackend.MATH) if w.attention else nullcontext()


def gradient(w: Workload) -> Product:
    def product(V: Tensor) -> Tensor:
        gradients = torch.autograd.grad(w.loss(w.model, w.batch), w.parameters)
        return gradients[0]

    return product


def gradient_of_second_derivatives(w: Workload) -> Product:
    plain = gradient(w)

    def product(V: Tensor) -> Tensor:
        with second_derivatives(w):
            return plain(V)

    return product


UNIT = "gradient"
UNIT_MATH = "gradient, MATH attention"
OURS = "torchlinop, kept"
REBUILT = "torchlinop, rebuilt"
HE = "hessian-eigenthings"
CL = "curvlinops"

UNITS = {UNIT: Candidate(gradient), UNIT_MATH: Candidate(gradient_of_second_derivatives)}
PRODUCTS = {
    OURS: Candidate(ours(linearization="keep")),
    REBUILT: Candidate(ours(linearization="rebuild")),
    "torchlinop, forward over reverse": Candidate(ours(method="forward_over_reverse")),
    HE: Candidate(hessian_eigenthings),
    CL: Candidate(curvlinops),
    f"{OURS}, block of 8": Candidate(ours(linearization="keep"), columns=8),
    f"{OURS}, block of 16": Candidate(ours(linearization="keep"), columns=16),
    f"{CL}, block of 8": Candidate(curvlinops, columns=8),
    f"{CL}, block of 16": Candidate(curvlinops, columns=16),
}


# Time


@dataclass(frozen=True)
class Ready:
    """A candidate that is built, warm, and has given the right product."""

    product: Product
    V: Tensor
    calls: int  # in one sample
    error: float
    notes: tuple[str, ...]

    def seconds_per_vector(self) -> float:
        return seconds(self.product, self.V, self.calls) / self.V.shape[1]


def measure(w: Workload, repetitions: int) -> dict[str, Measurement]:
    """Warm everything up, then let all candidates take turns."""
    torch.manual_seed(1)
    V = torch.randn(w.size, 16, device=w.batch[0].device)
    failures: dict[str, Measurement] = {}
    ready: dict[str, Ready] = {}
    reference: Tensor | None = None
    for name, candidate in {**UNITS, **PRODUCTS}.items():
        try:
            ready[name], HV = prepare(candidate, w, V)
        except ImportError as error:
            failures[name] = Measurement(failure=f"not installed ({error.name})")
        except (RuntimeError, NotImplementedError) as error:
            failures[name] = Measurement(failure=f"fails: {str(error).splitlines()[0][:100]}")
        else:
            if name in PRODUCTS:
                reference = HV[:, :1] if reference is None else reference
                ready[name] = agreeing(name, ready[name], HV, reference)
    samples: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(repetitions):
        for name, candidate in ready.items():
            samples[name].append(candidate.seconds_per_vector())
    measured = {
        name: Measurement(tuple(samples[name]), r.error, r.notes) for name, r in ready.items()
    }
    return measured | failures


def prepare(candidate: Candidate, w: Workload, V: Tensor) -> tuple[Ready, Tensor]:
    block = V[:, : candidate.columns].contiguous()
    with logged("torchlinop") as notes:
        product = candidate.build(w)
        HV = product(block)
    calls = max(1, round(SAMPLE_SECONDS / seconds(product, block, 2)))
    return Ready(product, block, calls, 0.0, tuple(notes)), HV


def agreeing(name: str, ready: Ready, HV: Tensor, reference: Tensor) -> Ready:
    """Our products and hessian-eigenthings' must agree; another peer's error is shown.

    curvlinops 3.0.1 takes jvp(jacrev), which torch 2.15 gets wrong for the weights of a layer
    norm (jvp(grad) is right): its work is the same, so that it is timed all the same.
    """
    error = float((HV[:, :1] - reference).norm() / reference.norm())
    if not error <= TOLERANCE and CL not in name:
        raise SystemExit(f"{name} gives another product: relative error {error:.2g}")
    return Ready(ready.product, ready.V, ready.calls, error, ready.notes)


def seconds(product: Product, V: Tensor, calls: int) -> float:
    """Of one call, averaged."""
    wait(V)
    start = time.perf_counter()
    for _ in range(calls):
        product(V)
    wait(V)
    return (time.perf_counter() - start) / calls


def wait(V: Tensor) -> None:
    if V.is_cuda:
        torch.cuda.synchronize(V.device)


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


# Memory


def memory(workload: str, candidate: str, device: str) -> dict[str, Any]:
    """Peak and held bytes of a build and two products, measured in a fresh process."""
    command = [sys.executable, __file__, "--device", device, "--memory-of", workload, candidate]
    # Blocks of 64 KiB and more go back to the system when they are freed.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        return {"failure": (run.stderr.strip().splitlines() or ["no message"])[-1][:100]}
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def memory_of(workload: str, candidate: str, device: torch.device) -> dict[str, int]:
    """In this process: a tiny product first, which imports and loads what the candidate needs."""
    w = WORKLOADS[workload](device)
    chosen = PRODUCTS[candidate]
    V = torch.randn(w.size, chosen.columns, device=device)
    gradient(w)(V)
    chosen.build(w.first(1))(V)
    before = start_counting(device)
    product = chosen.build(w)
    for _ in range(2):
        product(V)
    wait(V)
    return {"peak": peak_bytes(device) - before, "held": held_bytes(device) - before}


def start_counting(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
    return held_bytes(device)


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


# Report


Results = dict[str, dict[str, Measurement]]  # by workload and candidate
Memory = dict[str, dict[str, dict[str, Any]]]


def ratios(measured: dict[str, Measurement], name: str, unit: str = UNIT) -> list[float]:
    """Of each repetition; empty if either was not measured."""
    return [a / b for a, b in zip(measured[name].seconds, measured[unit].seconds, strict=False)]


def middle(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values)) if values else math.nan


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def price_table(results: Results, titles: dict[str, str]) -> list[str]:
    columns = [(w, UNIT, titles[w]) for w in results]
    if "gpt2" in results:
        columns.append(("gpt2", UNIT_MATH, "GPT-2, in gradients with MATH attention"))
    rows = [
        [name, *(price(results[w], name, unit) for w, unit, _ in columns)]
        for name in [UNIT_MATH, *PRODUCTS]
    ]
    return table(["gradients per vector (range)", *(title for *_, title in columns)], rows)


def price(measured: dict[str, Measurement], name: str, unit: str) -> str:
    if measured[name].failure:
        return measured[name].failure
    values = ratios(measured, name, unit)
    error = measured[name].error
    wrong = f" WRONG by {error:.0e}" if not error <= TOLERANCE else ""
    return f"{middle(values):.2f} ({min(values):.2f}-{max(values):.2f}){wrong}"


def comparison_table(results: Results) -> list[str]:
    pairs = [
        (HE, OURS),
        (CL, OURS),
        (HE, REBUILT),
        *((f"{CL}, block of {k}", f"{OURS}, block of {k}") for k in (8, 16)),
        *((OURS, f"{OURS}, block of {k}") for k in (8, 16)),
    ]
    rows = []
    for slow, fast in pairs:
        values = [middle(ratios(measured, slow, fast)) for measured in results.values()]
        mean = geometric_mean([v for v in values if not math.isnan(v)])
        rows.append([f"{slow} / {fast}", *(f"{v:.2f}" for v in values), f"{mean:.2f}"])
    return table(["times as fast", *results, "geometric mean"], rows)


def memory_table(used: Memory) -> list[str]:
    def cell(entry: dict[str, Any]) -> str:
        if "failure" in entry:
            return str(entry["failure"])
        return f"{entry['peak'] / MIB:.0f} ({entry['held'] / MIB:.0f})"

    rows = [[name, *(cell(used[w][name]) for w in used)] for name in PRODUCTS]
    return table(["peak MiB above the model (held after two products)", *used], rows)


def targets(results: Results, used: Memory) -> list[str]:
    """Whether the targets hold; those whose peers are missing are not judged."""
    prices = {w: middle(ratios(m, OURS)) for w, m in results.items()}
    peers = [[middle(ratios(m, p, OURS)) for p in (HE, CL)] for m in results.values()]
    gains = [min(pair) for pair in peers if not any(map(math.isnan, pair))]
    blocks = {
        (w, k): middle(ratios(m, f"{OURS}, block of {k}", OURS))
        for (w, m), k in itertools.product(results.items(), (8, 16))
    }
    against = {
        w: middle(ratios(m, f"{OURS}, block of 16", f"{CL}, block of 16"))
        for w, m in results.items()
    }
    peaks = {w: (e[REBUILT].get("peak"), e[HE].get("peak")) for w, e in used.items()}
    lines = [
        verdict("a product costs at most 2.2 gradients", [p <= 2.2 for p in prices.values()]),
        verdict(
            f"1.5 times as fast as the faster peer, geometric mean ({geometric_mean(gains):.2f})",
            [geometric_mean(gains) >= 1.5] if gains else [],
        ),
        verdict(
            "blocks are not slower per vector than single products",
            [b <= NOISE for b in blocks.values()],
        ),
        verdict(
            "a block of 16 is as fast as curvlinops' block of 16",
            [a <= NOISE for a in against.values() if not math.isnan(a)],
        ),
        verdict(
            "rebuilt graphs take no more memory than hessian-eigenthings",
            [a <= NOISE * b for a, b in peaks.values() if a is not None and b is not None],
        ),
    ]
    return [*lines, ""]


def verdict(target: str, holds: Sequence[bool]) -> str:
    if not holds:
        return f"- not judged: {target}"
    return f"- {'holds' if all(holds) else 'FAILS'} ({sum(holds)} of {len(holds)}): {target}"


def notes(results: Results) -> list[str]:
    lines = []
    for w, measured in results.items():
        milliseconds = 1000 * middle(measured[UNIT].seconds)
        lines.append(f"- {w}: the gradient takes {milliseconds:.3g} ms")
        for name in (OURS, f"{OURS}, block of 8", f"{OURS}, block of 16"):
            lines += [f"- {w}, {name}: {note}" for note in measured[name].notes]
    return [*lines, ""]


def report(results: Results, used: Memory, titles: dict[str, str], facts: dict[str, Any]) -> str:
    about = "; ".join(f"{key} {value}" for key, value in facts.items())
    lines = ["# The price of a Hessian product", ""]
    lines += [
        "Unit: one eager gradient of the same loss on the same batch by the model's own",
        "parameters, with PyTorch's default attention kernel. Second derivatives need the",
        "MATH attention kernel; all products use it. float32. Median (range) of",
        f"{facts['repetitions']} interleaved repetitions; {about}.",
        "",
    ]
    lines += price_table(results, titles) + comparison_table(results)
    lines += memory_table(used) if used else []
    return "\n".join([*lines, "## Targets", "", *targets(results, used), *notes(results)])


def surroundings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "device": device_name(arguments.device),
        "threads": torch.get_num_threads(),
        "repetitions": arguments.repetitions,
        **{p: version(p) for p in ("torch", "curvlinops-for-pytorch", HE, "transformers")},
        "torchlinop": torchlinop.__version__,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "tests/benchmarks/bench_products.py", *sys.argv[1:]]),
    }


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def as_json(results: Results, used: Memory, facts: dict[str, Any]) -> str:
    timed = {
        w: {name: vars(measurement) for name, measurement in measured.items()}
        for w, measured in results.items()
    }
    return json.dumps({"facts": facts, "seconds_per_vector": timed, "memory": used}, indent=1)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--out", type=Path, help="directory for products.json and products.md")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    warnings.filterwarnings("ignore")  # of the peers and of torch
    torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, on a GPU too
    device = torch.device(arguments.device)
    if arguments.memory_of:
        print(json.dumps(memory_of(*arguments.memory_of, device)))
        return
    results, titles = {}, {}
    for name in arguments.workloads:
        workload = WORKLOADS[name](device)
        titles[name] = f"{workload.title} (n={workload.size:,})"
        print(f"timing {titles[name]} ...", file=sys.stderr)
        results[name] = measure(workload, arguments.repetitions)
    print("measuring memory ...", file=sys.stderr)
    used = {
        w: {name: memory(w, name, arguments.device) for name in PRODUCTS}
        for w in ([] if arguments.no_memory else arguments.workloads)
    }
    facts = surroundings(arguments)
    text = report(results, used, titles, facts)
    print(text)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "products.md").write_text(text)
        (arguments.out / "products.json").write_text(as_json(results, used, facts))


if __name__ == "__main__":
    main()
