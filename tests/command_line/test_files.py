"""Files are refused before the run, written whole, and never replaced unasked."""

import json
from pathlib import Path

import pytest
import torch

from torchlinop import MatrixOperator, lanczos, slq, trace
from torchlinop.algorithms.result import load_result
from torchlinop.command_line import main
from torchlinop.tensor_file import read, write

EYE = "def build(): return torch.eye(4)"
NOT_REACHED = "def build(): raise SystemExit('the run was begun')"
A = MatrixOperator(torch.diag(torch.arange(1.0, 31.0, dtype=torch.float64)))


def refused(capsys, *words):
    """The sentence with which a command is refused, with code 2."""
    assert main([str(word) for word in words]) == 2
    out, error = capsys.readouterr()
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "the run was begun" not in error
    assert not out
    return error


@pytest.mark.parametrize("command", ["eigs", "trace", "density"])
def test_what_is_saved_is_what_was_printed(command, spec, tmp_path, capsys):
    words = ["-k", "2"] if command == "eigs" else []
    path = tmp_path / "a.safetensors"
    main(
        [
            command,
            spec("def build(): return torch.diag(torch.arange(9.))"),
            *words,
            "--out",
            str(path),
        ]
    )
    printed = capsys.readouterr().out
    assert main(["show", str(path)]) == 0
    assert capsys.readouterr().out == printed
    assert [p.name for p in tmp_path.iterdir() if "model" not in p.name] == ["a.safetensors"]


@pytest.mark.parametrize("command", ["eigs", "trace", "density"])
@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("no/a.safetensors", "no folder"),
        ("/proc/a.safetensors", "cannot write into /proc ("),
        ("a.json", "; name it result.safetensors, say"),
        ("/", "expected a file that ends in .safetensors, got '/'"),
        ("folder.safetensors", "is a folder; give the name of a file"),
        ("there.safetensors", "exists; pass --overwrite, or the name of another file"),
    ],
)
def test_a_path_of_no_use_is_refused_before_the_run(
    command, path, sentence, *, spec, tmp_path, capsys
):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "there.safetensors").write_text("precious")
    made = spec(NOT_REACHED)
    assert sentence in refused(capsys, command, made, "--out", tmp_path / path)
    assert (tmp_path / "there.safetensors").read_text() == "precious"


def test_a_folder_in_place_of_the_state_is_refused_before_the_run(spec, tmp_path, capsys):
    (tmp_path / "a.checkpoint").mkdir()
    words = ["eigs", spec(NOT_REACHED), "--out", tmp_path / "a.safetensors", "--overwrite"]
    assert "a.checkpoint is a folder; give the name of a file" in refused(capsys, *words)


def test_a_file_is_replaced_if_asked(spec, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_text("old")
    assert main(["trace", spec(EYE), "--out", str(path), "--overwrite"]) == 0
    assert load_result(path).estimate == 4


def test_a_file_is_kept_if_the_run_fails(spec, tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    path.write_text("old")
    assert main(["trace", spec("def build(): 1 / 0"), "--out", str(path), "--overwrite"]) == 2
    assert path.read_text() == "old"


def test_a_package_that_is_missing_is_named_before_the_run(spec, tmp_path, capsys, monkeypatch):
    for module, words in (
        ("safetensors.torch", ["--out", tmp_path / "a.safetensors"]),
        ("matplotlib.figure", ["--plot", tmp_path / "a.png"]),
    ):
        monkeypatch.setitem(__import__("sys").modules, module, None)
        package = module.split(".")[0]
        sentence = refused(capsys, "trace", spec(NOT_REACHED), *words)
        assert f"this needs {package}; run: pip install {package}" in sentence


def test_a_picture_is_drawn_and_refused_before_the_run_where_it_cannot_be(spec, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    made, picture = spec("def build(): return torch.diag(torch.arange(30.))"), tmp_path / "a.png"
    for command in ("eigs", "trace", "density"):
        words = ["--plot", str(picture), "--overwrite", "--seed", "1"]
        assert main([command, made, *words]) == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    later = spec(NOT_REACHED)
    assert "exists; pass --overwrite" in refused(capsys, "eigs", later, "--plot", picture)
    sentence = refused(capsys, "eigs", later, "--plot", tmp_path / "a.xyz")
    assert "expected a file that ends in .avif or" in sentence or ".eps" in sentence


RESULTS = {
    "eigenpairs": lambda: lanczos(A, 3),
    "trace": lambda: trace(A, 20),
    "quadrature": lambda: slq(A, 2, 10),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_any_result_is_shown(kind, tmp_path, capsys):
    result = RESULTS[kind]()
    result.save(tmp_path / "a.safetensors")
    assert main(["show", str(tmp_path / "a.safetensors")]) == 0
    assert capsys.readouterr().out == f"{result}\n"
    assert main(["show", str(tmp_path / "a.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["result"] == type(result).__name__


def newer(path):
    tensors, header = read(path, "cpu")
    write(path, tensors, header | {"format": 9})


def foreign(path):
    write(path, {}, {"operator": "KFACOperator"})


def unfinished(path):
    write(path, {}, {"kind": "checkpoint"})


def of_others(path):
    __import__("safetensors.torch").torch.save_file({"a": torch.ones(2)}, str(path))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (newer, "was written by a newer version, in format 9, and this one reads format 1"),
        (foreign, "expected a saved result in"),
        (unfinished, "got a checkpoint; pass a file"),
        (of_others, "which has no header 'torchlinop' in JSON"),
        (lambda path: path.write_text("what"), "cannot read"),
        (Path.unlink, "cannot read"),
    ],
)
def test_a_file_of_something_else_is_not_shown(damage, sentence, tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    trace(A, 20).save(path)
    damage(path)
    assert sentence in refused(capsys, "show", path)


def test_a_result_without_a_picture_says_so(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    slq(A, 2, 10).save(tmp_path / "a.safetensors")
    words = ["show", str(tmp_path / "a.safetensors"), "--plot", str(tmp_path / "a.png")]
    assert main(words) == 2
    assert "a Quadrature has no picture; leave out --plot" in capsys.readouterr().err


def test_json_has_no_number_that_json_has_not(spec, tmp_path, capsys):
    assert main(["trace", spec(EYE), "--max-matvecs", "1", "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["stderr"] is None  # of one sample, infinite
    assert out.count("\n") == 1
