"""The records of ``bench gpu`` as one JSON document, and as tables in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torchlinop.bench.candidates import GGN, HESSIAN, OURS
from torchlinop.bench.claims import Claim, Sections, claims
from torchlinop.bench.tables import middle, table
from torchlinop.bench.worker import BEGUN, ENDED

FORMAT = 1
UNITS = {
    "seconds": "s, of a call",
    "seconds_per_vector": "s, of a product divided by its columns",
    "gradient_seconds": "s, of a gradient, taken by turns with the product",
    "start_seconds": "s, of building and the first products, compilation included",
    "gradients": "1, median of seconds_per_vector / gradient_seconds",
    "error": "1, relative to the reference",
    "peak_bytes": "B, above what was held before",
    "bus_bytes": "B, copied in one run, to the device (HtoD) and to the host (DtoH)",
    "bytes_per_second": "B/s",
    "copy_bytes_per_second": "B/s",
    "fraction_of_copy": "1, of the bandwidth of a copy",
    "residual": "1, largest ‖A x − λ x‖ / |λ|",
}
REHEARSAL = "A rehearsal with tiny models: its numbers mean nothing, and no claim is judged."
TITLES = {HESSIAN: "Hessian", GGN: "Generalised Gauss-Newton matrix"}
MIB = 2**20
RUNNING = {"status": "running", "reason": "", "seconds": None}


def document(
    records: Sequence[dict[str, Any]], facts: dict[str, Any], *, rehearsal: bool
) -> dict[str, Any]:
    """All that is known so far."""
    sections: Sections = {}
    for record in records:
        if "section" in record:
            rest = {key: value for key, value in record.items() if key != "section"}
            sections.setdefault(record["section"], []).append(rest)
    return {
        "format": FORMAT,
        "rehearsal": rehearsal,
        "units": UNITS,
        "facts": facts,
        "stages": stages(records),
        "sections": sections,
        "claims": [_claim(c, rehearsal) for c in claims(sections)],
    }


def stages(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How every stage ended; "running" if it has not."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        if record.get("event") == BEGUN:
            found[record["stage"]] = {"name": record["stage"], **RUNNING}
        elif record.get("event") == ENDED:
            how = {key: record[key] for key in ("status", "reason", "seconds")}
            found[record["stage"]] = {"name": record["stage"], **how}
    return list(found.values())


def _claim(claim: Claim, rehearsal: bool) -> dict[str, Any]:
    return vars(claim) | {"holds": None if rehearsal else claim.holds}


def text(found: dict[str, Any]) -> str:
    """The document in Markdown."""
    sections = found["sections"]
    lines = ["# torchlinop on a GPU", ""]
    lines += [f"**{REHEARSAL}**", ""] if found["rehearsal"] else []
    lines += table(["", ""], [[key, str(value)] for key, value in found["facts"].items()])
    lines += ["## Claims", "", *map(verdict, found["claims"]), ""]
    lines += ["## Tests", "", *_tests(sections.get("tests", []))]
    for matrix, title in TITLES.items():
        lines += [f"## {title}: gradients per vector (range)", ""]
        rows = [r for s in ("products", "compiled products") for r in sections.get(s, [])]
        lines += _products([r for r in rows if r.get("matrix") == matrix])
    lines += ["## Largest eigenpairs of a Hessian", "", *_eigsh(sections.get("eigsh", []))]
    lines += ["## Cross-entropy Hessian product", ""]
    lines += _bandwidth(sections.get("cross-entropy", []))
    lines += ["## Not measured", "", *_failures(found)]
    lines += ["## Stages", "", *_stages(found["stages"])]
    return "\n".join(lines)


def verdict(claim: dict[str, Any]) -> str:
    """A line that says what was found, and whether it is enough."""
    word = {True: "holds", False: "FAILS", None: "not judged"}[claim["holds"]]
    values = "; ".join(f"{name} {value:.3g}" for name, value in claim["found"].items())
    target = f"{claim['text']}: {claim['bound']} {claim['limit']:.3g}"
    return f"- {word}: {target}" + (f" ({values})" if values else "")


def _tests(records: Sequence[dict[str, Any]]) -> list[str]:
    counts = Counter(r["outcome"] for r in records)
    summary = ", ".join(f"{number} {outcome}" for outcome, number in counts.items())
    broken = [r for r in records if r["outcome"] in ("failed", "error")]
    lines = [f"- {r['outcome']}: {r['test']}: {r['reason']}" for r in broken]
    return [summary or "none were run", "", *lines, *([""] if lines else [])]


def _products(records: Sequence[dict[str, Any]]) -> list[str]:
    """A row for every candidate, a column for every workload."""
    measured = [r for r in records if "gradients" in r]
    workloads = list(dict.fromkeys(r["workload"] for r in measured))
    titles = {r["workload"]: f"{r['title']} (n={r['parameters']:,})" for r in measured}
    cells: dict[str, dict[str, str]] = {}
    for r in measured:
        of = f", block of {r['columns']}" if r["columns"] > 1 else ""
        way = "" if r["candidate"] != OURS else f", {r['variant']}"
        name = f"{r['candidate']}{way}{of}"
        # The eager product is timed again beside the compiled ones: the first time counts.
        cells.setdefault(name, {}).setdefault(r["workload"], _price(r))
    rows = [[name, *(row.get(w, "") for w in workloads)] for name, row in cells.items()]
    return table(["", *(titles[w] for w in workloads)], rows)


def _price(r: dict[str, Any]) -> str:
    pairs = zip(r["seconds_per_vector"], r["gradient_seconds"], strict=True)
    ratios = [a / b for a, b in pairs]
    held = "" if r["peak_bytes"] is None else f", {r['peak_bytes'] / MIB:.0f} MiB"
    wrong = "" if r["error"] <= 1e-4 else f", off by {r['error']:.0e}"
    return f"{r['gradients']:.2f} ({min(ratios):.2f}-{max(ratios):.2f}){held}{wrong}"


def _eigsh(records: Sequence[dict[str, Any]]) -> list[str]:
    rows = []
    for r in records:
        if "seconds" not in r:
            continue
        bus = r["bus_bytes"]
        moved = "" if bus is None else f"{bus['HtoD'] / MIB:.2f} + {bus['DtoH'] / MIB:.2f}"
        accuracy = f"{r['residual']:.0e}" + ("" if r["accurate"] else " (too coarse)")
        times = f"{middle(r['seconds']):.3g}"
        rows.append([r["title"], r["way"], times, str(r["products"]), accuracy, moved])
    header = ["", "", "s", "products", "residual", "MiB over the bus, to and from the device"]
    return table(header, rows)


def _bandwidth(records: Sequence[dict[str, Any]]) -> list[str]:
    rows = [
        [
            r["title"],
            r["dtype"],
            r["backend"],
            f"{r['bytes_per_second'] / 1e9:.0f}",
            f"{r['copy_bytes_per_second'] / 1e9:.0f}",
            f"{r['fraction_of_copy']:.2f}",
            f"{r['error']:.0e}",
        ]
        for r in records
        if "fraction_of_copy" in r
    ]
    return table(["", "", "", "GB/s at least", "copy, GB/s", "fraction", "error"], rows)


def _stages(found: Sequence[dict[str, Any]]) -> list[str]:
    rows = [
        [s["name"], s["status"], "" if s["seconds"] is None else f"{s['seconds']:.1f}"]
        for s in found
    ]
    return table(["", "", "s"], rows)


def _failures(found: dict[str, Any]) -> list[str]:
    """What is missing, and why: of stages, and of candidates."""
    lines = [
        f"- {stage['name']}: {stage['status']}"
        + (f", {stage['reason']}" if stage["reason"] else "")
        for stage in found["stages"]
        if stage["status"] != "done"
    ]
    for section, records in found["sections"].items():
        for r in records:
            if r.get("failure"):
                keys = ("workload", "title", "dtype", "matrix", "candidate", "variant", "way")
                what = [str(r[key]) for key in (*keys, "backend") if key in r]
                lines.append(f"- {section}: {', '.join(dict.fromkeys(what))}: {r['failure']}")
    return [*lines, ""] if lines else ["nothing", ""]
