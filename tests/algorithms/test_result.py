"""What is saved is what is loaded."""

import json
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from torchlinop import EigenResult, MatrixOperator, ParameterLayout, lanczos
from torchlinop.algorithms.result import Result, load_result
from torchlinop.errors import OptionError
from torchlinop.tensor_file import read, write


@dataclass(frozen=True)
class Answer(Result):
    values: Tensor
    coarse: Tensor
    count: int
    error: float
    exact: bool
    missing: Tensor | None
    dtype: torch.dtype
    layout: ParameterLayout | None
    warnings: tuple[str, ...]

    _columns: ClassVar[tuple[str, ...]] = ("values",)


@dataclass(frozen=True)
class Other(Result):
    count: int


@dataclass(frozen=True)
class Whole(Result):
    rows: Tensor
    part: Answer

    _parts: ClassVar[dict[str, type[Result]]] = {"part": Answer}


LAYOUT = ParameterLayout.of(nn.Linear(2, 3))
ANSWER = Answer(
    torch.tensor([2.0, math.nan], dtype=torch.float64),
    torch.tensor([0.5], dtype=torch.bfloat16),
    7, math.inf, True, None, torch.bfloat16, LAYOUT, ("slow", "noisy"),
)  # fmt: skip


def test_every_kind_of_field_survives_a_file(tmp_path):
    ANSWER.save(tmp_path / "a.safetensors")
    loaded = Answer.load(tmp_path / "a.safetensors")
    torch.testing.assert_close(loaded.values, ANSWER.values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(loaded.coarse, ANSWER.coarse)
    names = ("count", "error", "exact", "missing", "dtype", "layout", "warnings")
    assert [getattr(loaded, n) for n in names] == [getattr(ANSWER, n) for n in names]


def test_a_result_is_saved_within_another(tmp_path):
    whole = Whole(torch.eye(2), ANSWER)
    whole.save(tmp_path / "w.safetensors")
    loaded = Whole.load(tmp_path / "w.safetensors")
    assert torch.equal(loaded.rows, whole.rows)
    assert repr(loaded.part) == repr(ANSWER)
    whole.save_npz(tmp_path / "w.npz")
    with np.load(tmp_path / "w.npz") as arrays:
        assert arrays["part.values"][0] == 2


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers_survive_a_file(dtype, tmp_path):
    X = torch.randn(3, 2, dtype=dtype)
    write(tmp_path / "x", {"X": X, "adjoint": X.mH, "one": torch.ones(1)}, {})
    tensors, _ = read(tmp_path / "x", "cpu")
    assert torch.equal(tensors["X"], X)
    assert torch.equal(tensors["adjoint"], X.mH)
    assert tensors["one"].dtype == torch.float32


def test_complex_eigenpairs_survive_a_file(tmp_path):
    A = torch.tensor([[2, 1j], [-1j, 3]], dtype=torch.complex128)
    result = lanczos(MatrixOperator(A), 1)
    result.save(tmp_path / "e.safetensors")
    assert torch.equal(
        EigenResult.load(tmp_path / "e.safetensors").eigenvectors, result.eigenvectors
    )


@pytest.mark.parametrize("cls", Result.__subclasses__(), ids=lambda cls: cls.__name__)
def test_a_result_equals_itself_alone(cls):
    """Comparing tensors field by field has no truth value."""
    if cls.__module__.startswith("torchlinop"):
        assert cls.__eq__ is object.__eq__


def test_a_table_has_a_row_an_entry():
    pytest.importorskip("pandas")
    table = ANSWER.to_dataframe()
    assert list(table.columns) == ["values"]
    assert table["values"][0] == 2


def test_a_file_of_another_result_is_refused(tmp_path):
    Other(3).save(tmp_path / "o.safetensors")
    with pytest.raises(OptionError, match=r"expected an Answer of format 1 in .*, got an Other"):
        Answer.load(tmp_path / "o.safetensors")


def test_numpy_reads_tensors_and_numbers(tmp_path):
    ANSWER.save_npz(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as arrays:
        assert sorted(arrays) == ["coarse", "count", "error", "exact", "values"]
        assert arrays["coarse"].tolist() == [0.5]
        assert int(arrays["count"]) == 7


def test_scalars_are_numbers_and_entries_of_columns():
    scalars = ANSWER.scalars()
    assert scalars.keys() == {"values/1", "values/2", "count", "error", "exact"}
    assert scalars["values/1"] == 2.0


def test_a_table_without_pandas_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(OptionError, match="this needs pandas; run: pip install pandas"):
        ANSWER.to_dataframe()


def without_a_tensor(tensors, header):
    return {}, header


def with_a_tensor_too_many(tensors, header):
    return tensors | {"more": torch.zeros(1)}, header


def without_fields(tensors, header):
    return tensors, {k: v for k, v in header.items() if k != "fields"}


def with_a_dtype_that_is_none(tensors, header):
    return tensors, header | {"fields": header["fields"] | {"dtype": {"dtype": "load"}}}


def of_a_later_format(tensors, header):
    return tensors, header | {"format": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_tensor, "damaged or incomplete .*'values'"),
        (with_a_tensor_too_many, "damaged or incomplete .*'more'"),
        (without_fields, "damaged or incomplete .*'fields'"),
        (with_a_dtype_that_is_none, "damaged or incomplete .*'load' is no dtype"),
        (of_a_later_format, "a newer version, in format 2, .* pip install --upgrade torchlinop"),
    ],
)
def test_a_changed_file_is_refused(change, message, tmp_path):
    path = tmp_path / "a.safetensors"
    ANSWER.save(path)
    write(path, *change(*read(path, "cpu")))
    with pytest.raises(OptionError, match=message):
        Answer.load(path)
    with pytest.raises(OptionError, match=message):
        load_result(path)


def test_any_result_is_loaded_as_the_class_that_saved_it(tmp_path):
    path = tmp_path / "a.safetensors"
    ANSWER.save(path)
    loaded = load_result(path)
    assert type(loaded) is Answer
    assert str(loaded.to_dict()) == str(ANSWER.to_dict())


def test_a_file_of_something_else_is_no_result(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, {}, {"kind": "checkpoint", "of": {}})
    with pytest.raises(OptionError, match=r"expected a saved result in .*, got a checkpoint; pass"):
        load_result(path)


def test_a_dictionary_has_numbers_and_columns_as_json_has_them():
    found = json.loads(json.dumps(ANSWER.to_dict()))
    assert found["result"] == "Answer"
    assert (found["dtype"], found["warnings"]) == ("bfloat16", ["slow", "noisy"])
    assert found["values"][0] == 2.0
    assert "coarse" not in found


def torch_pickle(path):
    torch.save({"values": ANSWER.values}, path)


def half_a_file(path):
    ANSWER.save(path)
    path.write_bytes(path.read_bytes()[:-8])


def tensors_of_others(path):
    safetensors.torch.save_file({"values": ANSWER.values}, str(path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch_pickle, "cannot read .* as a safetensors file"),
        (half_a_file, "cannot read .* as a safetensors file"),
        (lambda path: path.write_bytes(b""), "cannot read .* as a safetensors file"),
        (lambda path: None, "cannot read .* as a safetensors file"),
        (tensors_of_others, "expected a file written by .save"),
    ],
)
def test_a_foreign_file_is_refused_and_never_unpickled(make, message, tmp_path, monkeypatch):
    make(tmp_path / "file")
    monkeypatch.setattr("pickle.Unpickler", None)
    monkeypatch.setattr("pickle.load", None)
    with pytest.raises(OptionError, match=message):
        Answer.load(tmp_path / "file")
