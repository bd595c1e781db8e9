"""Operators are their definitions in every cell of a table, and algorithms answer as SciPy does."""

import json

import pytest
from curvlinops_defects import DEFECTS
from judged_algorithms import ALGORITHMS, CASES
from judged_algorithms import error as error_of_algorithm
from judged_operators import (
    CELLS,
    DTYPES,
    OPERATORS,
    ROWS,
    THEIR_CELLS,
    error_of_ours,
    error_of_theirs,
)
from judged_page import PAGE, beyond_tolerance, page, verdict
from judged_record import RECORD, rounded

record = json.loads(RECORD.read_text())
KNOWN = {(name, loss, cell) for name, loss, cell, _ in beyond_tolerance(record)}


def some(cells):
    """One cell of every operator and loss, the next for the next: each meets all of them."""
    names, losses = (list(dict.fromkeys(column)) for column in zip(*ROWS, strict=True))
    return [
        (name, loss, cells[(5 * names.index(name) + losses.index(loss)) % len(cells)])
        for name, loss in ROWS
    ]


def case(name, loss, cell):
    wrong = (name, loss, str(cell)) in KNOWN
    marks = [pytest.mark.xfail(strict=True, reason="as the page says")] if wrong else []
    return pytest.param(name, loss, cell, marks=marks, id=f"{name}-{loss}-{cell}")


@pytest.mark.parametrize(("name", "loss", "cell"), [case(*one) for one in some(CELLS)])
def test_operator_is_its_definition(name, loss, cell):
    assert error_of_ours(name, loss, cell) <= OPERATORS[name].tolerance[DTYPES[cell.dtype]]


@pytest.mark.parametrize(
    ("name", "loss", "cell"),
    [one for one in some(THEIR_CELLS) if OPERATORS[one[0]].theirs],
    ids=str,
)
def test_curvlinops_agrees_is_off_or_refuses_as_the_page_says(name, loss, cell):
    recorded = record["curvlinops"][name][loss][THEIR_CELLS.index(cell)]
    found = error_of_theirs(name, loss, cell)
    assert verdict(found, cell.dtype) == verdict(recorded, cell.dtype)


@pytest.mark.parametrize(("name", "spectrum", "dtype"), CASES)
@pytest.mark.filterwarnings("ignore::torchlinop.errors.OrthogonalityWarning")
def test_algorithm_answers_as_scipy_does(name, spectrum, dtype):
    assert error_of_algorithm(name, spectrum, dtype) <= ALGORITHMS[name].tolerance[dtype]


@pytest.mark.parametrize("name", DEFECTS)
@pytest.mark.filterwarnings("ignore")
def test_what_curvlinops_gets_wrong_is_right_here(name):
    theirs, ours = DEFECTS[name][1]()
    assert ours <= (1e-7 if name in ITERATIVE else 1e-12)
    assert isinstance(theirs, str) or theirs > 1e-3
    recorded = record["defects"][name][0]
    assert rounded(theirs) == (
        recorded if isinstance(theirs, str) else pytest.approx(recorded, 0.2)
    )


ITERATIVE = {"conjugate_gradients_by_default", "ghosts_of_lanczos"}  # to √u, and in float32


def test_the_page_is_what_the_record_renders_to():
    assert PAGE.read_text() == page(record)


def test_the_record_has_every_cell():
    assert [(n, loss) for n, row in record["operators"].items() for loss in row] == ROWS
    cells = (row for of_loss in record["operators"].values() for row in of_loss.values())
    assert {len(row) for row in cells} == {len(CELLS)}
    cells = (row for of_loss in record["curvlinops"].values() for row in of_loss.values())
    assert {len(row) for row in cells} == {len(THEIR_CELLS)}
    of_algorithms = record["algorithms"].items()
    assert [f"{n}, {kind}" for n, row in of_algorithms for kind in row] == list(
        map(", ".join, CASES)
    )
    assert list(record["defects"]) == list(DEFECTS)


@pytest.mark.parametrize(("name", "spectrum", "dtype"), CASES)
def test_the_record_of_an_algorithm_is_within_its_tolerance(name, spectrum, dtype):
    recorded = record["algorithms"][name][f"{spectrum}, {dtype}"]
    assert recorded <= ALGORITHMS[name].tolerance[dtype]
