"""The command as a shell runs it: exit codes, streams, signals, and a run killed for good."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from torchlinop.algorithms.result import load_result
from torchlinop.command_line import main

SCRIPT = Path(sysconfig.get_path("scripts")) / "torchlinop"
# A small network, which may kill its own process in a product.
MODEL = """
import os, signal
import torch
from torch import nn

def build():
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    data = [(torch.randn(n, 12).double(), torch.randint(0, 5, (n,))) for n in (40, 24)]
    return model, data, nn.CrossEntropyLoss()

def dying():
    from torchlinop import HessianOperator, LambdaOperator
    from torchlinop.losses import supervised_loss
    model, data, loss = build()
    H = HessianOperator(model, data, supervised_loss(loss))
    left = int(os.environ.get("PRODUCTS", 0))

    def product(v):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
        return H @ v

    return LambdaOperator(H.size, product, dtype=H.dtype)
"""
EIGS = ["-k", "4", "--which", "SA", "--ncv", "12", "--tol", "1e-8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where ``my_model.py`` is."""
    path = tmp_path_factory.mktemp("folder")
    (path / "my_model.py").write_text(MODEL)
    return path


@pytest.fixture(scope="module")
def shell(folder):
    """A function: words to what the command did, in that folder."""

    def run(*words, **environment):
        command = [sys.executable, "-m", "torchlinop", *words]
        variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        return subprocess.run(
            command, capture_output=True, text=True, cwd=folder, env=variables, check=False
        )

    return run


@pytest.fixture(scope="module")
def whole(folder):
    """The result of a run that nothing stopped."""
    with contextlib.chdir(folder):
        assert main(["eigs", "my_model.py:dying", *EIGS, "--out", "whole.safetensors"]) == 0
    return load_result(folder / "whole.safetensors")


def assert_same_bits(a, b):
    for name in ("eigenvalues", "eigenvectors", "residual_norms", "error_bounds", "converged"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert (a.matvecs, a.restarts, a.status) == (b.matvecs, b.restarts, b.status)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_a_run_killed_halfway_goes_on_to_the_same_bits(how, shell, folder, whole):
    out, state = folder / f"{how}.safetensors", folder / f"{how}.checkpoint"
    words = ["eigs", "my_model.py:dying", *EIGS, "--out", out.name]
    killed = shell(*words, PRODUCTS=str(whole.matvecs // 2), SIGNAL=how)
    assert killed.returncode == (-signal.SIGKILL if how == "SIGKILL" else 1)
    assert state.exists()
    assert out.exists() == (how == "SIGINT")
    again = shell(*words, "--resume")
    assert again.returncode == 0, again.stderr
    assert_same_bits(load_result(out), whole)
    assert not state.exists()


def test_results_are_on_stdout_and_nothing_is_on_stderr(shell):
    done = shell("eigs", "my_model.py:build", "-k", "3", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(done.stdout)["eigenvalues"]) == 3


def test_a_reader_that_is_gone_does_not_cost_the_result(folder):
    words = ["eigs", "my_model.py:build", "-k", "3", "--out", "read.safetensors"]
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "torchlinop", *words]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=folder, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")
    assert len(load_result(folder / "read.safetensors")) == 3


def test_a_module_of_this_folder_is_found_and_bad_input_is_one_sentence(shell):
    done = shell("trace", "my_model:nothing")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: expected a function 'nothing' in my_model, which has ")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(shutil.which("torchlinop") is None and not SCRIPT.exists(), reason="no script")
def test_the_console_script_is_the_same_command():
    script = str(SCRIPT) if SCRIPT.exists() else "torchlinop"
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __import__("torchlinop").__version__


def test_the_demonstration_needs_no_file_of_ours(capsys, monkeypatch):
    pytest.importorskip("sklearn")
    import torchlinop.demo

    monkeypatch.setattr(torchlinop.demo, "main", lambda: print("shown"))  # which CI runs itself
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "shown" in out
    assert "Your own model: torchlinop doctor my_model.py:build" in out


def test_a_demonstration_without_its_data_says_what_to_install(capsys, monkeypatch):

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    __import__("torchlinop.testing.digits").testing.digits._trained.cache_clear()
    assert main(["demo"]) == 2
    assert 'pip install "torchlinop[demo]"' in capsys.readouterr().err


def test_the_model_of_the_demonstration_is_a_spec(capsys):
    pytest.importorskip("sklearn")

    assert main(["trace", "torchlinop.demo:build", "--max-matvecs", "16", "--json"]) == 0
    assert "1,810x1,810 float64" in json.loads(capsys.readouterr().out)["operator"]
