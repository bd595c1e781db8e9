"""A comparison as one page of HTML, which loads nothing: pictures, tables, and what they mean."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Protocol

from torchlinop.compare.charts import Series, Style, chart, styles, swatch
from torchlinop.compare.history import History
from torchlinop.compare.rows import Column, Row, columns_of

_COSTS = (("products", "products with the matrix"), ("seconds", "seconds"))


class Findings(Protocol):
    """Of a comparison, what a page shows: see the fields of ``Comparison``."""

    @property
    def title(self) -> str: ...
    @property
    def problems(self) -> Sequence[str]: ...
    @property
    def rows(self) -> Sequence[Row]: ...
    @property
    def histories(self) -> Sequence[History]: ...
    @property
    def measure(self) -> str: ...
    @property
    def target(self) -> float: ...
    @property
    def facts(self) -> Mapping[str, str]: ...
    @property
    def notes(self) -> Sequence[str]: ...
    @property
    def warnings(self) -> Sequence[str]: ...
    @property
    def left_out(self) -> Mapping[str, str]: ...


def page(comparison: Findings) -> str:
    """The whole page. All that is printed is escaped; there is a script of a few lines."""
    looks = styles(list(dict.fromkeys(row.solver for row in comparison.rows)))
    title = escape(f"Comparison {comparison.title}")
    facts = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in comparison.facts.items()
    )
    warnings = "".join(f'<p class="warning">{escape(w)}</p>' for w in comparison.warnings)
    sections = "\n".join(_section(comparison, name, looks) for name in comparison.problems)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<dl>{facts}</dl>
{warnings}
<input type="radio" name="cost" id="products" checked><label for="products">products</label>
<input type="radio" name="cost" id="seconds"><label for="seconds">seconds</label>
<main>
{sections}
{_legend_of_columns(comparison)}
</main>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _section(comparison: Findings, problem: str, looks: dict[str, Style]) -> str:
    rows = [row for row in comparison.rows if row.problem == problem]
    pictures = "\n".join(
        f'<div class="pictures against-{cost}">{_histories(comparison, problem, looks, cost, name)}'
        f"{_scatter(comparison, rows, looks, cost, name)}</div>"
        for cost, name in _COSTS
    )
    return (
        f"<section><h2>{escape(problem)}</h2>\n{_legend(rows, looks)}\n{pictures}\n"
        f"{_table(rows, looks)}</section>"
    )


def _legend(rows: Sequence[Row], looks: dict[str, Style]) -> str:
    entries = "".join(
        f'<li data-solver="{looks[row.solver].number}" title="click to hide or show">'
        f"{swatch(looks[row.solver])}<b>{looks[row.solver].number}</b> {escape(row.solver)}</li>"
        for row in rows
        if math.isfinite(row.accuracy)
    )
    return f'<ul class="legend">{entries}</ul>'


def _histories(
    comparison: Findings, problem: str, looks: dict[str, Style], cost: str, name: str
) -> str:
    series = []
    for h in comparison.histories:
        if h.problem == problem:
            costs = h.products if cost == "products" else h.seconds
            pairs = sorted(zip(costs, h.values, strict=True), key=lambda pair: pair[0])
            series.append(Series(h.solver, [c for c, _ in pairs], [v for _, v in pairs]))
    return _figure(comparison, series, looks, name, "How it gets there: a run for every point")


def _scatter(
    comparison: Findings, rows: Sequence[Row], looks: dict[str, Style], cost: str, name: str
) -> str:
    series = [
        Series(
            r.solver, [getattr(r, cost).median], [r.accuracy], r.verdict in {"false claim", "wrong"}
        )
        for r in rows
        if not r.failures and math.isfinite(r.accuracy)
    ]
    caption = "Where it ends: cost and accuracy. Red rings: false claims, wrong answers"
    return _figure(comparison, series, looks, name, caption)


def _figure(
    comparison: Findings, series: Sequence[Series], looks: dict[str, Style], name: str, text: str
) -> str:
    picture = chart(series, looks, across=name, up=comparison.measure, target=comparison.target)
    return f"<figure>{picture}<figcaption>{escape(text)}.</figcaption></figure>"


def _table(rows: Sequence[Row], looks: dict[str, Style]) -> str:
    # Verdict and remarks have a form of their own, and what nobody knows has no column.
    columns = [c for c in columns_of(rows)[:-2] if any(c.cell(row) != "-" for row in rows)]
    head = "".join(
        f'<th class="{_kind(c)}" title="{escape(c.meaning)}">{escape(c.header)}</th>'
        for c in columns
    )
    body = "\n".join(line for row in rows for line in _lines(row, columns, looks))
    return (
        f'<div class="wide"><table><thead><tr><th></th><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _lines(row: Row, columns: Sequence[Column], looks: dict[str, Style]) -> Iterator[str]:
    cells = "".join(f'<td class="{_kind(c)}">{escape(c.cell(row))}</td>' for c in columns)
    kind = row.verdict.replace(" ", "-")
    badge = f'<td><span class="badge {kind}">{escape(row.verdict)}</span></td>'
    look = looks[row.solver]
    yield (
        f'<tr class="{kind}" data-solver="{look.number}">'
        f'<th style="color:{look.colour}">{look.number}</th>{badge}{cells}</tr>'
    )
    if row.remarks:
        yield (
            f'<tr class="remarks {kind}" data-solver="{look.number}"><td></td><td></td>'
            f'<td colspan="{len(columns)}">{escape(row.remarks)}</td></tr>'
        )


def _kind(column: Column) -> str:
    return "solver" if column.header == "solver" else "number"


def _legend_of_columns(comparison: Findings) -> str:
    columns = [c for c in columns_of(comparison.rows) if c.meaning]
    meanings = "".join(f"<dt>{escape(c.header)}</dt><dd>{escape(c.meaning)}</dd>" for c in columns)
    notes = "".join(f"<li>{escape(note)}</li>" for note in comparison.notes)
    absent = "; ".join(f"{name} ({why})" for name, why in comparison.left_out.items())
    left_out = f"<p>Left out: {escape(absent)}.</p>" if absent else ""
    return (
        f"<section><h2>How it was measured</h2><ul>{notes}</ul>"
        f"<dl>{meanings}</dl>{left_out}</section>"
    )


_STYLE = """
:root { color-scheme: light; }
body { font: 14px/1.45 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #1f2937;
  background: #fff; max-width: 1240px; margin: 0 auto; padding: 18px 20px 40px; }
h1 { font-size: 21px; margin: 0 0 6px; } h2 { font-size: 17px; margin: 26px 0 6px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 1px 12px; margin: 0 0 10px;
  font-size: 12.5px; color: #4b5563; }
dt { font-weight: 600; color: #374151; } dd { margin: 0; overflow-wrap: anywhere; }
input[name=cost] { margin: 0 5px 0 0; vertical-align: -1px; }
label { margin-right: 16px; font-weight: 600; }
.pictures.against-seconds { display: none; }
#seconds:checked ~ main .pictures.against-seconds { display: flex; }
#seconds:checked ~ main .pictures.against-products { display: none; }
.pictures { display: flex; gap: 12px; } .pictures figure { flex: 1; margin: 0; min-width: 0; }
figcaption { font-size: 12px; color: #6b7280; margin: 0 0 8px 62px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11.5px; } svg text:not(.number) { fill: #4b5563; }
svg text.name.name { fill: #1f2937; }
svg text.number { font-size: 11px; font-weight: 700; paint-order: stroke; stroke: #fff;
  stroke-width: 3px; }
.grid { stroke: #e5e7eb; } .axis { stroke: #6b7280; fill: none; }
line.level { stroke: #dc2626; stroke-dasharray: 4 4; } svg text.level.level { fill: #dc2626; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 4px 0 8px;
  padding: 0; font-size: 12.5px; }
.legend li { cursor: pointer; white-space: nowrap; } .legend li.off { opacity: .35; }
.swatch { display: inline-block; width: 34px; height: 14px; vertical-align: -2px;
  margin-right: 5px; }
.series.off { display: none; } .series.faint { opacity: .12; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 12.5px; font-variant-numeric: tabular-nums;
  width: 100%; }
th, td { padding: 3px 6px; text-align: right; white-space: nowrap; }
thead th { border-bottom: 1.5px solid #6b7280; cursor: help; font-weight: 600; }
tbody tr:not(.remarks) > * { border-top: 1px solid #e5e7eb; }
td:nth-child(2) { text-align: left; }
.solver { text-align: left; white-space: normal; min-width: 150px; }
.remarks td { padding: 0 6px 4px; white-space: normal; text-align: left; font-size: 12px; }
.remarks.wrong td, .remarks.false-claim td, .remarks.failed td { color: #b91c1c; }
tr.failed, tr.failed + tr.remarks.failed { background: #fef2f2; }
tr.false-claim, tr.wrong { background: #fff7ed; }
.badge { border-radius: 8px; padding: 1px 8px; font-size: 11.5px; font-weight: 600; }
.badge.ok { background: #dcfce7; color: #166534; }
.badge.not-reached { background: #f3f4f6; color: #374151; }
.badge.false-claim, .badge.wrong { background: #fed7aa; color: #9a3412; }
.badge.failed { background: #fecaca; color: #991b1b; }
.warning { color: #9a3412; } .empty { color: #6b7280; margin: 60px; }
@media (max-width: 900px) { .pictures { flex-direction: column; } }
"""

_SCRIPT = """
const all = (what) => [...document.querySelectorAll(what)];
const of = (node) => all(`.series[data-solver="${node.dataset.solver}"]`);
for (const item of all(".legend li, tbody tr")) {
  item.onmouseenter = () => {
    for (const s of all(".series")) s.classList.add("faint");
    for (const s of of(item)) s.classList.remove("faint");
  };
  item.onmouseleave = () => {
    for (const s of all(".series")) s.classList.remove("faint");
  };
}
for (const item of all(".legend li")) item.onclick = () => {
  const off = item.classList.toggle("off");
  for (const s of of(item)) s.classList.toggle("off", off);
};
"""
