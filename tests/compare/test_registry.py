"""Solvers are found by name, pattern or function, and left out where they do not suit."""

import pytest
import torch

from torchlinop import MatrixOperator
from torchlinop.compare import Candidate, compare, eigensolver, linear_solver
from torchlinop.compare.registry import Registry
from torchlinop.errors import OptionError
from torchlinop.testing import RotatedOperator, spectra

A = RotatedOperator(spectra.neural(40))
QUICK = {"seeds": 1, "histories": False, "memory": False}


@pytest.fixture
def registry():
    return Registry("test solver")


def test_a_function_is_returned_as_it_was(registry):
    def solve(A, request):
        return None

    assert registry("name")(solve) is solve
    assert registry.names == ("name",)
    assert registry.select([solve])[0].name == "name"


def test_patterns_choose_several_and_each_once(registry):
    for name in ("a one", "a two", "b"):
        registry(name)(lambda A, request: None)
    assert [c.name for c in registry.select(["a*", "a one", "b"])] == ["a one", "a two", "b"]
    assert [c.name for c in registry.select("a*")] == ["a one", "a two"]
    assert len(registry.select(None)) == 3


def test_an_unknown_name_lists_the_known(registry):
    registry("a")(lambda A, request: None)
    with pytest.raises(OptionError, match="unknown test solver 'x'; known: a"):
        registry.select(["x"])
    with pytest.raises(OptionError, match="unknown test solver 'x'; known: a"):
        registry.remove("x")


def test_other_functions_of_one_name_are_told_apart(registry):
    def named():
        return lambda A, request: None

    one, two = named(), named()
    assert [c.name for c in registry.select([one, two, one])] == ["<lambda>", "<lambda> (2)"]


def test_one_end_is_an_end(registry):
    registry("a", which="SA")(lambda A, request: None)
    assert registry.select(["a"])[0].which == {"SA"}


def test_a_solver_needs_a_name(registry):
    with pytest.raises(OptionError, match="expected a name for the test solver, got none"):
        registry(" ")(lambda A, request: None)


def test_ones_own_solver_may_be_defined_again(registry):
    registry("a")(lambda A, request: 1)
    registry("a")(lambda A, request: 2)
    assert registry.select(["a"])[0].solve(None, None) == 2


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"requires": ("no_such_package",)}, "not installed: no_such_package"),
        ({"requires": ("no_such.module",)}, "not installed: no_such.module"),
        ({"which": frozenset({"SA"})}, "finds SA, not LA"),
        ({"max_size": 10}, "for n up to 10"),
        ({"cuda": True}, "for matrices on a CUDA device"),
    ],
)
def test_what_does_not_suit_is_a_row_if_asked_for_by_name(facts, reason):
    asked = Candidate("mine", lambda A, request: 1 / 0, **facts)
    row = compare(A, 3, solvers=[asked], **QUICK).rows[0]
    assert (row.verdict, row.failure) == ("failed", reason)


def test_what_does_not_suit_is_left_out_if_all_are_asked_for():
    eigensolver("mine", requires="no_such_package")(lambda A, request: 1 / 0)
    try:
        found = compare(A, 3, **QUICK)
    finally:
        eigensolver.remove("mine")
    assert found.left_out["mine"] == "not installed: no_such_package"
    assert "mine (not installed: no_such_package)" in repr(found)


def test_what_does_not_suit_is_left_out_if_a_pattern_chose_it():
    found = compare(A, 3, solvers=["dense*", "torchlinop deflated*"], **QUICK)
    assert [row.solver for row in found.rows] == ["dense eigh"]
    assert found.left_out == {"torchlinop deflated power": "finds LM, not LA"}


def test_half_precision_is_for_our_solvers():
    theirs = Candidate("other", lambda A, request: None)
    assert theirs.unsuited(RotatedOperator(spectra.flat(8)), "LA") == ""
    half = MatrixOperator(torch.eye(8, dtype=torch.bfloat16))
    assert theirs.unsuited(half, "LA") == "not for torch.bfloat16"


def test_a_kind_of_solver_has_the_article_of_its_name():
    with pytest.raises(OptionError, match="expected the name of a linear solver or a function"):
        linear_solver.select([3])


def test_kinds_of_solvers_do_not_mix():
    assert "torchlinop minres" in linear_solver.names
    assert "torchlinop minres" not in eigensolver.names
