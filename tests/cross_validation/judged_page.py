"""The page that a record renders to."""

from __future__ import annotations

import inspect
import itertools
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import curvlinops_defects
import judged_algorithms
import judged_operators
from curvlinops_defects import DEFECTS
from judged_algorithms import ALGORITHMS, CASES
from judged_losses import LOSSES
from judged_operators import CELLS, DTYPES, LIKELIHOODS, OPERATORS, THEIR_CELLS
from judged_record import Results

PAGE = Path(__file__).parents[2] / "docs" / "cross_validation.md"

GROUPS = {  # columns, by how the names of their operators begin
    "Hessian": lambda name: name in ("Hessian", "Hessian, forward over reverse"),
    "finite differences": lambda name: name == "Hessian, finite differences",
    "GGN": lambda name: name.startswith("GGN"),
    "Fisher": lambda name: name == "Fisher",
    "Monte Carlo Fisher": lambda name: name == "Monte Carlo Fisher",
    "empirical Fisher": lambda name: name == "empirical Fisher",
    "gradients": lambda name: name.startswith("gradient"),
    "blocks, diagonal": lambda name: name.endswith("of the GGN"),
    "Jacobian": lambda name: name == "Jacobian",
    "K-FAC": lambda name: name.startswith("K-FAC"),
    "EKFAC": lambda name: name.startswith("EKFAC"),
}
THEIR_GROUPS = ("Hessian", "GGN", "empirical Fisher", "K-FAC", "EKFAC")


def page(results: Results) -> str:
    """Markdown; the same JSON gives the same page."""
    of_operators = sum(len(row) for rows in results["operators"].values() for row in rows.values())
    of_theirs = sum(len(row) for rows in results["curvlinops"].values() for row in rows.values())
    facts = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return "\n".join(
        [
            _INTRODUCTION.format(
                operators=f"{of_operators:,}",
                rows=len(OPERATORS),
                losses=len(LOSSES),
                likelihoods=len(LIKELIHOODS),
                facts=facts,
            ),
            *(f"### {dtype}\n\n{_of_ours(results, dtype)}\n" for dtype in DTYPES),
            "### Beyond the tolerance\n",
            _beyond(results),
            _THEIRS.format(cells=f"{of_theirs:,}"),
            _of_theirs(results),
            _ALGORITHMS.format(cells=len(CASES)),
            _of_algorithms(results),
            _DEFECTS,
            *_reproducers(results),
        ]
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def in_group(results: Results, section: str, group: str, loss: str) -> list[list[float | str]]:
    """The cells of all its operators under a loss."""
    rows = results[section].items()
    return [of_loss[loss] for name, of_loss in rows if GROUPS[group](name) and loss in of_loss]


def _of_ours(results: Results, dtype: str) -> str:
    at = [i for i, cell in enumerate(CELLS) if cell.dtype == dtype]

    def errors(group: str, loss: str) -> list[float]:
        return [row[i] for row in in_group(results, "operators", group, loss) for i in at]

    counts = {g: max(len(errors(g, loss)) for loss in LOSSES) for g in GROUPS}
    return table(
        ["loss", *(f"{g} ({counts[g]})" for g in GROUPS)],
        (
            [loss, *(f"{max(e):.0e}" if (e := errors(g, loss)) else "–" for g in GROUPS)]
            for loss in LOSSES
        ),
    )


def beyond_tolerance(results: Results) -> list[tuple[str, str, str, float]]:
    """Operator, loss, cell and error."""
    return [
        (name, loss, str(cell), error)
        for name, of_loss in results["operators"].items()
        for loss, row in of_loss.items()
        for cell, error in zip(CELLS, row, strict=True)
        if not error <= OPERATORS[name].tolerance[DTYPES[cell.dtype]]
    ]


def _beyond(results: Results) -> str:
    """A row for every column above, loss and cell."""
    worst: dict[tuple[str, ...], list[float]] = {}
    for name, loss, cell, error in beyond_tolerance(results):
        group = next(group for group, holds in GROUPS.items() if holds(name))
        worst.setdefault((group, loss, cell), []).append(error)
    if not worst:
        return "None.\n"
    rows = ([*where, str(len(errors)), f"{max(errors):.1e}"] for where, errors in worst.items())
    return table(["operators", "loss", "cell", "how many of them", "worst error"], rows) + "\n"


def _of_theirs(results: Results) -> str:
    return table(
        ["loss", *THEIR_GROUPS],
        (
            [loss, *(_verdicts(in_group(results, "curvlinops", g, loss)) for g in THEIR_GROUPS)]
            for loss in LOSSES
        ),
    )


def verdict(error: float | str, dtype: str) -> str:
    """Whether it agrees with the definition, is off, or which exception it raises."""
    if isinstance(error, str):
        return error
    return "agrees" if error <= judged_operators.EXACT[DTYPES[dtype]] else "off"


def _verdicts(rows: Sequence[Sequence[float | str]]) -> str:
    cells = [
        (error, verdict(error, cell.dtype))
        for row in rows
        for error, cell in zip(row, THEIR_CELLS, strict=True)
    ]
    said = []
    agreeing = [v for _, v in cells if v == "agrees"]
    off = [error for error, v in cells if v == "off"]
    raised = [v for error, v in cells if isinstance(error, str)]
    if agreeing:
        said.append(f"{len(agreeing)} agree")
    if off:
        said.append(f"**{len(off)} off by up to {max(off):.1g}**")
    said += [f"{raised.count(name)} {name}" for name in dict.fromkeys(raised)]
    return ", ".join(said)


def _of_algorithms(results: Results) -> str:
    kinds = list(itertools.product(judged_algorithms.SPECTRA, DTYPES))

    def row(name: str) -> list[str]:
        errors = [results["algorithms"][name].get(", ".join(kind)) for kind in kinds]
        tolerance = ALGORITHMS[name].tolerance
        unit = " σ" if tolerance is judged_algorithms.DEVIATIONS else ""
        shown = ["–" if e is None else f"{e:.1f}{unit}" if unit else f"{e:.0e}" for e in errors]
        limits = list(dict.fromkeys(f"{tolerance[dtype]:.0e}" for dtype in DTYPES))
        return [name, *shown, f"{tolerance['float64']:.0f}{unit}" if unit else ", ".join(limits)]

    return table(
        ["algorithm", *(", ".join(kind) for kind in kinds), "tolerance"],
        (row(name) for name in ALGORITHMS),
    )


def _reproducers(results: Results) -> Iterable[str]:
    yield f"\n```python\n{_preamble()}```\n"
    for name, (title, reproducer) in DEFECTS.items():
        theirs, ours = results["defects"][name]
        they = f"raises {theirs}" if isinstance(theirs, str) else f"error {theirs:.2g}"
        source = inspect.getsource(reproducer).split("\n", 1)[1]  # without the decorator
        yield f"### {title}\n\ncurvlinops: {they}. torchlinop: error {ours:.1g}.\n"
        yield f"```python\n{source}```\n"


def _preamble() -> str:
    """The imports of the reproducers, and the functions that they share."""
    source = inspect.getsource(curvlinops_defects)
    imports = source[source.index("import curvlinops\n") : source.index("# Relative errors")]
    shared = ("relative", "theirs", "by_theirs", "raised", "of_model")
    functions = (inspect.getsource(getattr(curvlinops_defects, name)) for name in shared)
    return "import warnings\n\n" + imports.rstrip() + "\n\n\n" + "\n\n".join(functions)


_INTRODUCTION = textwrap.dedent("""\
    # Cross-validation

    Every operator, under every loss, reduction, batching and dtype, against its definition
    written out densely, and against curvlinops 3.0.1; every algorithm against SciPy. This page is
    generated by

    ```text
    python tests/cross_validation/write_page.py
    ```

    from measurements in [cross_validation.json](cross_validation.json); the tests measure a part
    of the same cells again, other ones for every operator and loss, and check that this page is
    what the record gives.

    On a CPU, with {facts}.

    ## Operators against their definitions

    {operators} cells: {rows} operators x {losses} losses ({likelihoods} for those that draw
    targets) x {{mean, sum}} x {{one batch, ragged batches of 5, 4 and 2, microbatches of 2}} x
    {{float64, float32}}. The model has two layers, the first of which is applied at two steps of
    each of 11 samples. The error is the largest entry of |A − definition| over the largest of
    |definition|; definitions are evaluated in float64 on all data at once, at the same numbers,
    by code that the operators do not share: rows of Jacobians from one backward pass each, sums
    over all outcomes of a target, loops over samples and positions. (The targets that Monte Carlo
    draws are those of the library; what it makes of them is judged.)

    Tolerances: 1e-12 in float64 and 1e-5 in float32; for finite differences, whose truncation and
    rounding balance at u^(2/3), 1e-8 and 2e-3. Worst errors, with the number of cells behind each
    in brackets; "–": not the likelihood of a distribution. "gradients" are outer product and
    covariance. K-FAC and EKFAC are those of types type-2, empirical, mc (and forward-only), with
    expand and reduce, jointly and separately.
    """)

_THEIRS = textwrap.dedent("""\

    ## curvlinops against the same definitions

    {cells} cells: those with an operator in curvlinops, without microbatches, which it has not;
    Monte Carlo is left out, as its draws are others. "off" is beyond the tolerance above; names
    are those of exceptions. With class weights or ignored labels and reduction "mean", several
    batches are weighed by samples. In one batch, the empirical Fisher is then the one here times
    N / Σw, which is another convention; it is neither in several. K-FAC and EKFAC of type-2 leave
    weights out, those of positives too, and count labels that are ignored. With probabilities of
    3 classes for targets and reduction "mean", they are 3 times as large. "Classes of two
    positions" are sequences, whose loss terms type-2 and the empirical type add up before they
    take products. Some of these are looked at more closely
    [below](#where-curvlinops-301-is-wrong).
    """)

_ALGORITHMS = textwrap.dedent("""\

    ## Algorithms against SciPy

    {cells} cells, on matrices of 40 rows with eigenvalues from 0.5 to 10, or from −7 to 10,
    against `scipy.linalg` in float64 (`eigh`, `solve`, `expm`, `sqrtm`, `cosm`, `norm`,
    `svdvals`). Tolerances follow from what is asked for: eigenvalues are accurate to the square
    of the residual, vectors to the residual over the gap or times the condition number. Estimates
    from random probes are judged in standard errors σ of their own; of the entries of a diagonal
    or points of a density, it is the worst.
    """)

_DEFECTS = textwrap.dedent("""\

    ## Where curvlinops 3.0.1 is wrong

    Reproducers, each with the relative error of curvlinops and ours, by the dense matrix that
    does not share code with either; the tests run all of them. Where the data are cut in another
    way, the error is the change. They begin with:
    """)
