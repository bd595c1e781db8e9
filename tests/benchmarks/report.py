"""Ratios of what was measured in one repetition, as tables, targets and JSON."""

from __future__ import annotations

import datetime
import itertools
import json
import math
import sys
from dataclasses import dataclass
from typing import Any

import torch

import torchlinop
from torchlinop.bench.candidates import (
    BLOCKS,
    CL,
    EF,
    GGN,
    HE,
    HESSIAN,
    MATRICES,
    OURS,
    REBUILT,
    UNIT,
    UNIT_MATH,
    block_of,
)
from torchlinop.bench.machine import device_name, version
from torchlinop.bench.tables import geometric_mean, middle, table, verdict
from torchlinop.bench.timing import Measurement

MIB = 2**20
ROUNDING = 1e-5  # errors above are shown
NOISE = 1.05  # ratios between candidates below this are within the noise of a shared machine

Timed = dict[str, dict[str, Measurement]]  # by workload and candidate
Used = dict[str, dict[str, dict[str, Any]]]  # bytes, likewise


@dataclass(frozen=True)
class Results:
    """All that was measured."""

    timed: dict[str, Timed]  # by matrix
    used: dict[str, Used]  # by matrix; empty if memory was not measured
    logits: dict[str, dict[str, Any]]  # bytes of GGN products of a large vocabulary, by candidate
    titles: dict[str, str]  # of the workloads
    facts: dict[str, Any]

    def as_json(self) -> str:
        timed = {
            matrix: {
                w: {name: vars(measurement) for name, measurement in measured.items()}
                for w, measured in workloads.items()
            }
            for matrix, workloads in self.timed.items()
        }
        memory = {"memory": self.used, "memory_of_a_large_vocabulary": self.logits}
        return json.dumps({"facts": self.facts, "seconds_per_vector": timed, **memory}, indent=1)

    def as_text(self) -> str:
        about = "; ".join(f"{key} {value}" for key, value in self.facts.items())
        lines = [
            "# The price of a product",
            "",
            "Unit: one eager gradient of the same loss on the same batch by the model's own",
            "parameters, with PyTorch's default attention kernel. Second derivatives need the",
            "MATH attention kernel; all products use it. float32. Median (range) of",
            f"{self.facts['repetitions']} interleaved repetitions; {about}.",
            "",
        ]
        for matrix, timed in self.timed.items():
            lines += [f"## {MATRICES[matrix].title}", "", *REMARKS[matrix]]
            lines += price_table(matrix, timed, self.titles) + comparison_table(matrix, timed)
            lines += memory_table(matrix, self.used[matrix]) if self.used else []
            lines += logits_table(self.logits) if matrix == GGN and self.logits else []
        lines += ["## Targets", ""]
        for matrix, timed in self.timed.items():
            lines += [f"{MATRICES[matrix].title}:", ""]
            lines += [*TARGETS[matrix](timed, self.used.get(matrix, {})), ""]
        lines += ["Large vocabulary:", "", *logits_targets(self.logits), ""]
        return "\n".join([*lines, "## Notes", "", *notes(self.timed)])


# Ratios


def ratios(measured: dict[str, Measurement], name: str, unit: str = UNIT) -> list[float]:
    """Of each repetition; empty if either was not measured."""
    return [a / b for a, b in zip(measured[name].seconds, measured[unit].seconds, strict=False)]


def middles(timed: Timed, slow: str, fast: str = UNIT) -> list[float]:
    """The ratio on every workload that has one."""
    found = [middle(ratios(measured, slow, fast)) for measured in timed.values()]
    return [ratio for ratio in found if not math.isnan(ratio)]


# Tables


def price_table(matrix: str, timed: Timed, titles: dict[str, str]) -> list[str]:
    columns = [(w, UNIT, titles[w]) for w in timed]
    if "gpt2" in timed:
        columns.append(("gpt2", UNIT_MATH, "GPT-2, in gradients with MATH attention"))
    rows = [
        [name, *(price(timed[w], name, unit) for w, unit, _ in columns)]
        for name in [UNIT_MATH, *MATRICES[matrix].candidates]
    ]
    return table(["gradients per vector (range)", *(title for *_, title in columns)], rows)


def price(measured: dict[str, Measurement], name: str, unit: str) -> str:
    if measured[name].failure:
        return measured[name].failure
    values = ratios(measured, name, unit)
    error = measured[name].error
    wrong = "" if error <= ROUNDING else f" off by {error:.0e}"
    return f"{middle(values):.2f} ({min(values):.2f}-{max(values):.2f}){wrong}"


def comparison_table(matrix: str, timed: Timed) -> list[str]:
    rows = []
    for slow, fast in MATRICES[matrix].pairs:
        values = [middle(ratios(measured, slow, fast)) for measured in timed.values()]
        mean = geometric_mean(middles(timed, slow, fast))
        rows.append([f"{slow} / {fast}", *(f"{v:.2f}" for v in values), f"{mean:.2f}"])
    return table(["times as fast", *timed, "geometric mean"], rows)


def memory_table(matrix: str, used: Used) -> list[str]:
    def cell(entry: dict[str, Any]) -> str:
        if "failure" in entry:
            return str(entry["failure"])
        return f"{entry['peak'] / MIB:.0f} ({entry['held'] / MIB:.0f})"

    rows = [[name, *(cell(used[w][name]) for w in used)] for name in MATRICES[matrix].candidates]
    return table(["peak MiB above the model (held after two products)", *used], rows)


def logits_table(logits: dict[str, dict[str, Any]]) -> list[str]:
    rows = []
    for name, entry in logits.items():
        units = (
            entry[key] / entry["outputs"] for key in ("product", "held", "peak") if key in entry
        )
        cells = [f"{unit:.2f}" for unit in units]
        rows.append([name, *(cells or [entry["failure"], "", ""])])
    header = [
        "V=20,000, 1,024 tokens, in logits",
        "peak of a product",
        "held",
        "peak with the build",
    ]
    return table(header, rows)


REMARKS = {
    HESSIAN: [],
    GGN: [],
    EF: [
        "A term is a row of the outputs; with a loss_fn of samples, and for hessian-eigenthings,",
        "it is a sample. These are two matrices for GPT-2, where a sample has 128 tokens.",
        "",
    ],
}


# Targets


def hessian_targets(timed: Timed, used: Used) -> list[str]:
    peers = [[middle(ratios(m, p, OURS)) for p in (HE, CL)] for m in timed.values()]
    gains = [min(pair) for pair in peers if not any(map(math.isnan, pair))]
    mean = geometric_mean(gains)
    peaks = [(e[REBUILT].get("peak"), e[HE].get("peak")) for e in used.values()]
    return [
        verdict("a product costs at most 2.2 gradients", at_most(2.2, timed, OURS)),
        verdict(
            f"1.5 times as fast as the faster peer, geometric mean ({mean:.2f})",
            [mean >= 1.5] if gains else [],
        ),
        *block_targets(timed),
        verdict(
            "rebuilt graphs take no more memory than hessian-eigenthings",
            [a <= NOISE * b for a, b in peaks if a is not None and b is not None],
        ),
    ]


def gauss_newton_targets(timed: Timed, used: Used) -> list[str]:
    return [
        verdict("an exact product costs at most 1.6 gradients", at_most(1.6, timed, OURS)),
        verdict("twice as fast as curvlinops", at_most(1 / 2, timed, OURS, CL)),
        verdict("as fast as hessian-eigenthings", at_most(NOISE, timed, OURS, HE)),
        *block_targets(timed),
    ]


def empirical_fisher_targets(timed: Timed, used: Used) -> list[str]:
    return block_targets(timed)


TARGETS = {HESSIAN: hessian_targets, GGN: gauss_newton_targets, EF: empirical_fisher_targets}


def block_targets(timed: Timed) -> list[str]:
    largest = max(BLOCKS)
    blocks = [at_most(NOISE, timed, block_of(k, OURS), OURS) for k in BLOCKS]
    return [
        verdict(
            "blocks are not slower per vector than single products",
            list(itertools.chain.from_iterable(blocks)),
        ),
        verdict(
            f"a block of {largest} is as fast as curvlinops' block of {largest}",
            at_most(NOISE, timed, block_of(largest, OURS), block_of(largest, CL)),
        ),
    ]


def logits_targets(logits: dict[str, dict[str, Any]]) -> list[str]:
    entries = [logits.get(name, {}) for name in (OURS, REBUILT)]
    buffers = [entry["product"] / entry["outputs"] for entry in entries if "product" in entry]
    target = "a GGN product takes at most 4 buffers of the size of the logits"
    return [verdict(target, [b <= 4 for b in buffers])]


def at_most(limit: float, timed: Timed, name: str, unit: str = UNIT) -> list[bool]:
    """Whether the ratio is, on every workload that has both."""
    return [ratio <= limit for ratio in middles(timed, name, unit)]


# Circumstances


def notes(timed: dict[str, Timed]) -> list[str]:
    lines = []
    for (matrix, workloads), w in itertools.product(timed.items(), next(iter(timed.values()))):
        measured = workloads[w]
        milliseconds = 1000 * middle(measured[UNIT].seconds)
        lines.append(f"- {matrix}, {w}: the gradient takes {milliseconds:.3g} ms")
        for name in (OURS, *(block_of(k, OURS) for k in BLOCKS)):
            lines += [f"- {matrix}, {w}, {name}: {note}" for note in measured[name].notes]
    return [*lines, ""]


def surroundings(device: str, repetitions: int) -> dict[str, Any]:
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "repetitions": repetitions,
        **{p: version(p) for p in ("torch", "curvlinops-for-pytorch", HE, "transformers")},
        "torchlinop": torchlinop.__version__,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "tests/benchmarks/bench_products.py", *sys.argv[1:]]),
    }
