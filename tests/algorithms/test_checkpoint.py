"""A run continued from its file ends bit by bit as one that was never interrupted."""

import math
import sys

import pytest
import torch

from torchlinop import MatrixOperator
from torchlinop.algorithms.checkpoint import Checkpoint
from torchlinop.errors import OptionError

PROBLEM = {"n": 300, "dtype": torch.float64, "seed": 0}


def test_a_file_gives_back_tensors_and_numbers_bit_by_bit(tmp_path):
    checkpoint = Checkpoint(tmp_path / "run.safetensors", PROBLEM)
    assert checkpoint.load() is None
    V = torch.randn(3, 5).to(torch.bfloat16)
    for step in (1, 2):  # the second one replaces the first
        checkpoint.save({"V": V}, {"step": step, "scale": 0.1, "bound": math.inf})
    tensors, numbers = checkpoint.load()
    assert torch.equal(tensors["V"], V)
    assert numbers == {"step": 2, "scale": 0.1, "bound": math.inf}
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]


def test_an_interrupted_write_leaves_the_state_before(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path / "run.safetensors", PROBLEM)
    checkpoint.save({"V": torch.ones(2)}, {})

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save({"V": torch.zeros(2)}, {})
    assert torch.equal(checkpoint.load()[0]["V"], torch.ones(2))
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]


def test_a_file_of_another_problem_is_refused_with_the_difference(tmp_path):
    path = tmp_path / "run.safetensors"
    Checkpoint(path, PROBLEM).save({}, {})
    other = Checkpoint(path, {"n": 400, "dtype": torch.float64, "seed": 1})
    with pytest.raises(OptionError, match=r"is of n=300, seed=0, expected n=400, seed=1; pass"):
        other.load()


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    MatrixOperator(torch.eye(2))  # a file of something else is as good as none
    path.write_bytes(b"something else")
    with pytest.raises(OptionError, match="as a safetensors file"):
        Checkpoint(path, PROBLEM).load()


def test_what_cannot_be_written_is_refused_before_a_run(tmp_path, monkeypatch):
    with pytest.raises(OptionError, match=r"expected checkpoint to be .* directory that exists"):
        Checkpoint(tmp_path / "missing" / "run.safetensors", PROBLEM).load()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(OptionError, match="needs safetensors; run: pip install safetensors"):
        Checkpoint(tmp_path / "run.safetensors", PROBLEM).load()
