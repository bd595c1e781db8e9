"""``torchlinop compare``: a table, a page, and one sentence for bad input."""

import json
import uuid

import pytest

from torchlinop.command_line import main
from torchlinop.compare import eigensolver

SOURCE = """
import torch
from torchlinop.compare import eigensolver
from torchlinop.testing import RotatedOperator, spectra

def build():
    return RotatedOperator(spectra.neural(60))

def two():
    return {"a": build(), "b": build()}

def broken():
    raise KeyError("what")

number = 3
"""
QUICK = ["-k", "3", "--seeds", "1", "--no-histories", "--solver", "torchlinop lanczos"]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module that can be imported."""
    name = f"module_{uuid.uuid4().hex}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_table_a_page_and_numbers(module, tmp_path, capsys):
    page, numbers = tmp_path / "out.html", tmp_path / "out.json"
    code = main(["compare", f"{module}:build", *QUICK, "--html", str(page), "--out", str(numbers)])
    assert code == 0
    assert "torchlinop lanczos" in capsys.readouterr().out
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert json.loads(numbers.read_text())["rows"][0]["converged"] == 3


def test_ctrl_c_prints_the_rows_there_are_and_ends_with_code_1(tmp_path, capsys):
    path = tmp_path / "interrupted.py"
    solver = """
@eigensolver("of one who loses patience")
def impatient(A, request):
    raise KeyboardInterrupt
"""
    path.write_text(SOURCE + solver)
    asked = ["torchlinop lanczos", "of one who loses patience"]
    given = [word for name in asked for word in ("--solver", name)]
    try:
        assert main(["compare", f"{path}:build", "-k", "3", "--seeds", "1", *given]) == 1
    finally:
        eigensolver.remove("of one who loses patience")
    assert "interrupted: these are the rows that there were" in capsys.readouterr().out


def test_all_numbers_are_printed_as_one_json_object(module, capsys):
    assert main(["compare", f"{module}:two", *QUICK, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 2


def test_the_matrix_of_a_model_is_compared_on(mlp, capsys):
    assert main(["compare", mlp, *QUICK, "--operator", "ggn"]) == 0
    assert "torchlinop lanczos" in capsys.readouterr().out


def test_a_file_will_do_in_place_of_a_module(tmp_path, capsys):
    path = tmp_path / "some_file.py"
    path.write_text(SOURCE)
    assert main(["compare", f"{path}:build", *QUICK]) == 0
    assert "torchlinop lanczos" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("no_such_module_here:build", "could not import 'no_such_module_here': ModuleNotFound"),
        ("no_such_file.py:build", "could not import 'no_such_file.py': ModuleNotFoundError: no fi"),
        ("MODULE", "expected MODULE:FUNCTION or FILE.py:FUNCTION, got"),
        ("MODULE:", "expected MODULE:FUNCTION or FILE.py:FUNCTION, got"),
        ("MODULE:nope", "expected a function 'nope' in"),
        ("MODULE:number", "which has build, two, broken; name one"),
        ("MODULE:broken", "broken raised KeyError: 'what'"),
    ],
)
def test_a_bad_spec_is_one_sentence_and_code_2(spec, sentence, module, capsys):
    assert main(["compare", spec.replace("MODULE", module), *QUICK]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--solver", "nope"], "unknown eigensolver 'nope'"),
        (["-k", "0"], "expected k and seconds to be positive"),
        (["--out", "."], "error: . is a folder; give the name of a file"),
        (["--out", __file__], "exists; pass --overwrite, or the name of another file"),
        (["--html", "/no/such/folder/out.html"], "no folder /no/such/folder to write out.html"),
        (["--html", "a.html", "--out", "a.html"], "--html and --out are both a.html; give two"),
    ],
)
def test_a_bad_option_is_one_sentence_and_code_2(options, sentence, module, capsys):
    assert main(["compare", f"{module}:build", *QUICK, *options]) == 2
    assert sentence in capsys.readouterr().err
