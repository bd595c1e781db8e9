"""What the library is meant to reach on a GPU, and whether the records say that it does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torchlinop.bench import eigsh_stage
from torchlinop.bench.candidates import GGN, HESSIAN, OURS
from torchlinop.bench.gpu_workloads import SMALL
from torchlinop.bench.product_stage import BLOCK
from torchlinop.bench.tables import middle
from torchlinop.bench.variants import EAGER

Sections = dict[str, list[dict[str, Any]]]  # records by section
NOISE = 1.05  # ratios below this are within the noise of a measurement


@dataclass(frozen=True)
class Claim:
    """A bound, and what was found, by workload."""

    text: str
    bound: Literal["at most", "at least"]
    limit: float
    found: dict[str, float]

    @property
    def holds(self) -> bool | None:
        """None where nothing was found that could be judged."""
        if not self.found:
            return None
        if self.bound == "at most":
            return all(value <= self.limit for value in self.found.values())
        return all(value >= self.limit for value in self.found.values())


def claims(sections: Sections) -> list[Claim]:
    """All of them, judged or not."""
    products = [r for r in sections.get("products", []) if "gradients" in r]
    compiled = [r for r in sections.get("compiled products", []) if "gradients" in r]
    return [
        Claim("tests marked gpu that fail", "at most", 0, _failing(sections.get("tests", []))),
        Claim(
            "gradients a Hessian product takes, eager",
            "at most",
            2.2,
            _gradients(products, HESSIAN),
        ),
        Claim(
            "gradients a Hessian product takes, compiled or captured, small models",
            "at most",
            1.5,
            _fastest(compiled),
        ),
        Claim("gradients a GGN product takes, eager", "at most", 1.6, _gradients(products, GGN)),
        Claim(
            "times as fast as the faster peer, Hessian, eager",
            "at least",
            1.5,
            dict(_against_peers(products)),
        ),
        Claim(
            f"time per vector of a block of {BLOCK}, in that of a single product",
            "at most",
            NOISE,
            dict(_blocks(products)),
        ),
        Claim(
            "bandwidth of the cross-entropy kernel, in that of a copy",
            "at least",
            0.8,
            _bandwidths(sections.get("cross-entropy", [])),
        ),
        Claim(
            "time of lanczos, in that of eigsh of cupyx, equally accurate",
            "at most",
            NOISE,
            dict(_against_cupyx(sections.get("eigsh", []))),
        ),
        Claim(
            "vectors that eigsh of cupyx moves over the bus, in all",
            "at most",
            1.0,
            dict(_vectors_moved(sections.get("eigsh", []))),
        ),
    ]


def _failing(tests: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Nothing where every test was skipped: that proves nothing."""
    outcomes = [r["outcome"] for r in tests]
    if not set(outcomes) - {"skipped"}:
        return {}
    return {"tests/gpu": float(outcomes.count("failed") + outcomes.count("error"))}


def _gradients(
    records: Sequence[dict[str, Any]], matrix: str, columns: int = 1
) -> dict[str, float]:
    return {
        r["workload"]: r["gradients"]
        for r in records
        if (r["matrix"], r["candidate"], r["variant"], r["columns"])
        == (matrix, OURS, EAGER, columns)
    }


def _fastest(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of the ways that are not eager, single Hessian products."""
    ours = [r for r in records if r["candidate"] == OURS and r["variant"] != EAGER]
    single = [r for r in ours if r["matrix"] == HESSIAN and r["columns"] == 1]
    found: dict[str, float] = {}
    for r in single:
        if r["workload"] in SMALL:
            found[r["workload"]] = min(r["gradients"], found.get(r["workload"], r["gradients"]))
    return found


def _against_peers(records: Sequence[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    for workload, ours in _gradients(records, HESSIAN).items():
        peers = [
            r["gradients"]
            for r in records
            if (r["workload"], r["matrix"], r["columns"]) == (workload, HESSIAN, 1)
            and r["candidate"] != OURS
        ]
        if peers:
            yield workload, min(peers) / ours


def _blocks(records: Sequence[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    for matrix in (HESSIAN, GGN):
        blocks = _gradients(records, matrix, BLOCK)
        for workload, single in _gradients(records, matrix).items():
            if workload in blocks:
                yield f"{matrix}, {workload}", blocks[workload] / single


def _bandwidths(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {
        f"{r['title']}, {r['dtype']}": r["fraction_of_copy"]
        for r in records
        if r["backend"] == "triton" and "fraction_of_copy" in r
    }


def _by_way(records: Sequence[dict[str, Any]]) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """Workloads, each with what was measured of every way."""
    measured = [r for r in records if "seconds" in r]
    for workload in dict.fromkeys(r["workload"] for r in measured):
        yield workload, {r["way"]: r for r in measured if r["workload"] == workload}


def _against_cupyx(records: Sequence[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    for workload, ways in _by_way(records):
        pair = [ways.get(name) for name in (eigsh_stage.OURS, eigsh_stage.CUPYX)]
        if all(r is not None and r["accurate"] for r in pair):
            ours, theirs = (middle(r["seconds"]) for r in pair if r is not None)
            yield workload, ours / theirs


def _vectors_moved(records: Sequence[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    for workload, ways in _by_way(records):
        found = ways.get(eigsh_stage.CUPYX, {})
        if found.get("bus_bytes"):
            yield workload, sum(found["bus_bytes"].values()) / (4 * found["parameters"])
