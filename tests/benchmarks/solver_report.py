"""What was measured of solvers, as Markdown with the meaning of every number, and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from density_measures import DensityRow
from eigen_candidates import AT_EQUAL_PRODUCTS, HELD, OURS
from eigen_measures import Row
from report import table, verdict
from step_costs import OURS as DEFAULT
from step_costs import THEIRS, WHOLE, Costs

from torchlinop.compare.traces import TraceRow

WORSE = 1.1  # a ratio of eigenvalue errors above this is worse
ROUNDING = 1e-12  # eigenvalue errors below this are alike
DENSER = 1.5  # likewise for distances of densities
_OUR_NAME = "torchlinop"


@dataclass
class Results:
    """All that was measured; what was not is empty."""

    facts: dict[str, Any]
    pairs: dict[str, dict[str, Row]] = field(default_factory=dict)  # by matrix and solver
    budgets: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)  # and products
    costs: Costs | None = None
    traces: dict[str, dict[str, TraceRow]] = field(default_factory=dict)  # by case and estimator
    densities: dict[str, dict[str, DensityRow]] = field(default_factory=dict)

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def as_text(self) -> str:
        about = "; ".join(f"{key} {value}" for key, value in self.facts.items())
        lines = ["# Solvers, head to head", "", f"{about}.", ""]
        sections = [
            (self.pairs, "Eigenpairs", self._pairs),
            (self.budgets, "Eigenvalues at equal products", self._budgets),
            (self.costs, "A Lanczos step beside its product", self._costs),
            (self.traces, "Traces at equal products", self._traces),
            (self.densities, "Spectral densities at equal products", self._densities),
        ]
        for measured, title, section in sections:
            if measured:
                lines += [f"## {title}", "", *section(), ""]
        return "\n".join([*lines, "## Targets", "", *self.targets(), ""])

    # Tables

    def _pairs(self) -> Iterator[str]:
        header = ["solver", "products (calls)", "vectors", "host reads", "ms", "ms in products"]
        header += ["eigenvalue error", "residual", "claimed", "claims hold"]
        for title, rows in self.pairs.items():
            yield from [f"### {title}", ""]
            yield from table(header, [[name, *_pair_cells(row)] for name, row in rows.items()])
        yield from PAIRS.splitlines()

    def _budgets(self) -> Iterator[str]:
        for title, rows in self.budgets.items():
            products = list(next(iter(rows.values())))
            header = [title, *(f"{p} products" for p in products)]
            yield from table(header, [[n, *map(_error, r.values())] for n, r in rows.items()])
        yield from BUDGETS.splitlines()

    def _costs(self) -> Iterator[str]:
        assert self.costs
        costs = self.costs
        shown = list(next(iter(costs.solvers.values())).times_reading)
        header = [f"n = {costs.size:,}", *(f"j = {j}" for j in shown)]
        header += ["vectors a step", "reads a step (all)", f"s for {costs.steps} steps (quartiles)"]
        rows = []
        for name, c in costs.solvers.items():
            cells = [f"{c.times_reading[j]:.2f}" if j in c.times_reading else "-" for j in shown]
            q1, median, q3 = c.quartiles
            cells += [f"{c.allocations:.1f}", f"{c.reads[0]} ({c.reads[1]})"]
            rows.append([name, *cells, f"{c.seconds[0]:.2f} ({q1:.2f} {median:.2f} {q3:.2f})"])
        rows += [[name, f"not run: {why}"] + [""] * (len(header) - 2)
                 for name, why in costs.failures.items()]  # fmt: skip
        yield from table(header, rows)
        yield f"Reading: {costs.bandwidth / 1e9:.1f} GB/s."
        yield from COSTS.splitlines()

    def _traces(self) -> Iterator[str]:
        header = ["RMS error (coverage)", *self.traces]
        names = list(next(iter(self.traces.values())))
        rows = [[n, *(_trace_cell(found[n]) for found in self.traces.values())] for n in names]
        yield from table(header, rows)
        yield from TRACES.splitlines()

    def _densities(self) -> Iterator[str]:
        header = ["quadrature / density / s", *self.densities]
        names = list(next(iter(self.densities.values())))
        rows = [[n, *(_density_cell(r[n]) for r in self.densities.values())] for n in names]
        yield from table(header, rows)
        yield from DENSITIES.splitlines()

    # Targets

    def targets(self) -> Iterator[str]:
        ours = [
            (title, name, row)
            for title, rows in self.pairs.items()
            for name, row in rows.items()
            if name.startswith(_OUR_NAME)
        ]
        yield verdict("no row in which ours claims what is not so", [not r.false for *_, r in ours])
        yield from (f"  - {t}, {n}: {'; '.join(r.false)}" for t, n, r in ours if r.false)
        for name in (HELD, OURS):
            yield from self._never_worse(name, [name])
        every = [name for name in AT_EQUAL_PRODUCTS if name.startswith(_OUR_NAME)]
        yield from self._never_worse("the best of ours", every)
        yield from self._never_worse("torchlinop lobpcg", ["torchlinop lobpcg"], "lobpcg")
        yield from self._step_targets()
        yield from self._trace_targets()
        yield from self._density_targets()

    def _never_worse(self, name: str, ours: Sequence[str], kind: str = "") -> Iterator[str]:
        """Against peers whose name ends in ``kind``. An answer that is not given is the worst."""
        worse, holds = [], []
        for title, rows in self.budgets.items():
            for peer, errors in rows.items():
                if peer.startswith(_OUR_NAME) or not peer.endswith(kind):
                    continue
                for products, error in errors.items():
                    given = [rows[own][products] for own in ours]
                    mine = min((e for e in given if not math.isnan(e)), default=math.nan)
                    if math.isnan(error):
                        continue
                    fine = mine <= max(WORSE * error, ROUNDING)
                    holds.append(fine)
                    if not fine:
                        worse.append(f"  - {title}, {products} products: {mine:.1e}; "
                                     f"{peer} {error:.1e}")  # fmt: skip
        target = f"{name}: at equal products, no {kind or 'peer'} is more accurate"
        yield verdict(target, holds)
        yield from worse

    def _step_targets(self) -> Iterator[str]:
        solvers = self.costs.solvers if self.costs else {}
        mine = solvers.get(WHOLE)
        ratios = list(mine.times_reading.values()) if mine else []
        target = "a step takes at most 1.3 times as long as reading the stored basis four times"
        yield verdict(target, [r <= 1.3 for r in ratios])
        allocations = [mine.allocations <= 3] if mine else []
        yield verdict("a step allocates at most 3 vectors, with that of the product", allocations)
        yield verdict("the host reads nothing in a step", [mine.reads[0] == 0] if mine else [])
        theirs = solvers.get(THEIRS)
        for name in (WHOLE, DEFAULT):
            c = solvers.get(name)
            pairs = [theirs.seconds[0] / c.seconds[0]] if c and theirs else []
            ratio = f" ({pairs[0]:.2f} times)" if pairs else ""
            target = f"{name}: half the time of hessian-eigenthings' Lanczos{ratio}"
            yield verdict(target, [p >= 2 for p in pairs])

    def _trace_targets(self) -> Iterator[str]:
        """Root mean squares of N seeds are known to 1 / √(2 N), coverages to √(.88 · .12 / N)."""
        seeds = self.facts["seeds of traces"]
        noise, least = 1 + 3 / math.sqrt(seeds), 0.88 - 2 * math.sqrt(0.88 * 0.12 / seeds)
        for kind in ("hutchinson", "hutch++", "xtrace"):
            mine = f"{_OUR_NAME} {kind}"
            pairs = [
                (case, peer, rows[mine].error / row.error)
                for case, rows in self.traces.items()
                for peer, row in rows.items()
                if peer.endswith(kind) and peer != mine and not row.failure
            ]
            yield verdict(
                f"{kind} is as accurate as others' {kind}", [r <= noise for *_, r in pairs]
            )
            yield from (f"  - {c}: {r:.1f} times {p}" for c, p, r in pairs if r > noise)
        coverages = [
            (case, name, row.coverage)
            for case, rows in self.traces.items()
            for name, row in rows.items()
            if name.startswith(_OUR_NAME) and not math.isnan(row.coverage)
        ]
        target = f"two standard errors of ours cover 88 % (with so few seeds, {least:.2f} or more)"
        yield verdict(target, [c >= least for *_, c in coverages])
        yield from (f"  - {case}, {n}: {c:.2f}" for case, n, c in coverages if c < least)

    def _density_targets(self) -> Iterator[str]:
        pairs = []
        for case, rows in self.densities.items():
            mine, *peers = [(name, row) for name, row in rows.items() if not row.failure]
            pairs += [(case, n, mine[1].density / row.density) for n, row in peers]
        target = "the density is as near to the spectrum as others'"
        yield verdict(target, [r <= DENSER for *_, r in pairs])
        yield from (f"  - {case}: {r:.1f} times {n}" for case, n, r in pairs if r > DENSER)


def _pair_cells(row: Row) -> list[str]:
    if row.failure:
        return [row.failure, *[""] * 8]
    claimed = [] if math.isnan(row.claimed) else [f"{row.claimed:.0e}"]
    claimed += [] if row.converged is None else [f"{row.converged} converged"]
    holds = "yes" if row.claims else "none made"
    return [
        f"{row.columns} ({row.calls})",
        f"{row.vectors:.0f}",
        str(row.reads),
        f"{1000 * row.seconds:.1f}",
        f"{1000 * row.product_seconds:.1f}",
        f"{row.error:.0e}",
        f"{row.residual:.0e}",
        ", ".join(claimed) or "-",
        f"NO ({row.false_seeds} seeds): {'; '.join(row.false)}" if row.false else holds,
    ]


def _error(error: float) -> str:
    return "-" if math.isnan(error) else f"{error:.0e}"


def _trace_cell(row: TraceRow) -> str:
    if row.failure:
        return row.failure
    coverage = "" if math.isnan(row.coverage) else f" ({row.coverage:.2f})"
    return f"{row.error:.1e}{coverage}"


def _density_cell(row: DensityRow) -> str:
    if row.failure:
        return row.failure
    return f"{row.quadrature:.1e} / {row.density:.1e} / {row.seconds:.2f}"


PAIRS = """\
All are asked for the k largest eigenvalues (power iteration: of largest |λ|) with the same tol,
1e-6. It is relative to the eigenvalue but in SciPy's lobpcg, where it is absolute, and in
torch.lobpcg, where it is relative to norms. Power iteration may take 100 products a pair. All
starts are Gaussian; those that accept one are given hessian-eigenthings' own.

- products (calls): columns multiplied, counted by the matrix; the median of the seeds.
- vectors: of n numbers, held at most, with the result of the last product, from the starting
  vector to the answer. Measured: of torch's solvers on a pretended device, where a kernel's own
  temporary memory is not seen; of SciPy's by tracemalloc.
- host reads: how often the host waits for the device, counted there: numbers and tensors read,
  factorisations, shapes that depend on values. SciPy's solvers work on the host: every call.
- ms: wall time, the median; the matrices of prescribed spectrum cost O(n) a product, so that it is
  the solver's own time. ms in products: of that, inside the matrix.
- eigenvalue error: the largest |θ_i - λ_i| / |λ_i|, where the i-th value is compared with the i-th
  eigenvalue, copies counted. residual: the largest ‖A x - θ x‖ / |θ|, by products in float64 that
  do not count. Both of the worst seed.
- claimed: the largest relative residual by the solver's own account, and pairs it calls converged.
  SciPy's eigsh says so by returning.
- claims hold: residuals are at most 1.1 times those claimed; pairs called converged are, and are
  different eigenvalues; if all are, none of the largest is missing; error bounds hold (ours). Up
  to ten roundoffs of ‖A‖, 2e-15 ‖A‖, on all seeds. Residuals here are absolute."""
BUDGETS = """\
The median over seeds of the largest relative eigenvalue error, of answers that took at most so many
products. SciPy's eigsh cannot be held to a number: the best of several tolerances counts. All
others are told to stop there. "-": no answer with so few. "ncv = budget" holds as many vectors
as there are products, as hessian-eigenthings' Lanczos does."""
COSTS = """\
j: the least time between the end of product j and the start of the next, divided by the time that
reading four times j vectors takes at the speed above, which is that of a matrix-vector product with
a matrix of the size of the basis. "vectors a step": allocated in a step, at most, with the result
of the product. Reads: by the host, in the median step, and in all. Solvers take turns; the least
time, and the quartiles in parentheses. float32. With its usual ncv, `lanczos` restarts: j columns
are stored at other times than after product j."""
TRACES = """\
The root of the mean squared error, of all seeds, divided by Σ|λ|; in parentheses the fraction of
errors within two of the standard errors given. Random eigenvectors; the case names the
spectrum and the products allowed. PyHessian with its default tol stops before them."""
DENSITIES = """\
Wasserstein-1 distances to the true spectrum, divided by its range: of nodes and weights, and of the
smoothed density with default bandwidths on 10,000 points, the integral of |F - F_true|. Then
seconds. Medians of all seeds. The case names the spectrum, and probes x steps. curvlinops is given
the ends of the spectrum."""
