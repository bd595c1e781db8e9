"""A run that is stopped, by Ctrl-C, by a limit or for good, goes on bit by bit."""

import signal

import pytest
import torch

from torchlinop.algorithms.result import load_result
from torchlinop.command_line import main

# Rather many products, in one of which a signal comes.
SOURCE = """
import signal
from torchlinop import LambdaOperator
from torchlinop.testing import RotatedOperator, spectra

A = RotatedOperator(spectra.neural(300))
at = {at}
products = 0

def product(V):
    global products
    products += 1
    if products == at:
        {happens}
    return A @ V

def build():
    return LambdaOperator(A.size, product, dtype=A.dtype)
"""
COMMANDS = {
    "eigs": ["-k", "4", "--which", "SA", "--ncv", "12"],
    "density": ["--probes", "3", "--steps", "40"],
}
FIELDS = {
    "eigs": ("eigenvalues", "eigenvectors", "residual_norms", "matvecs", "history_residuals"),
    "density": ("grid", "density", "stderr", "matvecs"),
}


def source(happens="pass", at=0):
    return SOURCE.format(happens=happens, at=at)


def by_signal(number, at):
    return source(f"signal.raise_signal({int(number)})", at)


def assert_same(command, found, expected):
    for name in FIELDS[command]:
        a, b = getattr(found, name), getattr(expected, name)
        assert torch.equal(torch.as_tensor(a).nan_to_num(), torch.as_tensor(b).nan_to_num())


def uninterrupted(command, spec, tmp_path):
    path = tmp_path / "whole.safetensors"
    assert main([command, spec(source()), *COMMANDS[command], "--out", str(path)]) == 0
    return load_result(path)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_what_there_is_and_the_run_goes_on(command, number, spec, tmp_path, capsys):
    expected = uninterrupted(command, spec, tmp_path)
    calls = expected.matvecs if command == "eigs" else 40
    out = tmp_path / "a.safetensors"
    words = [*COMMANDS[command], "--out", str(out)]
    assert main([command, spec(by_signal(number, calls // 2)), *words]) == 1
    printed, told = capsys.readouterr()
    partial = load_result(out)
    assert 0 < partial.matvecs < expected.matvecs
    assert str(partial) in printed
    assert "interrupted" in printed or "converged" in printed
    assert "unfinished; to go on, with more products or time if need be: torchlinop" in told
    assert told.endswith("--resume\n")
    assert main([command, spec(source()), *words, "--resume"]) == 0
    assert_same(command, load_result(out), expected)
    assert not out.with_suffix(".checkpoint").exists()


def test_a_budget_ends_a_run_that_a_larger_one_goes_on_with(spec, tmp_path):
    expected = uninterrupted("eigs", spec, tmp_path)
    out, made = tmp_path / "a.safetensors", spec(source())
    words = ["eigs", made, *COMMANDS["eigs"], "--out", str(out)]
    assert main([*words, "--max-matvecs", "20"]) == 1
    assert main([*words, "--resume"]) == 0
    assert_same("eigs", load_result(out), expected)


def test_without_a_file_a_partial_result_is_printed(spec, capsys):
    assert main(["eigs", spec(by_signal(signal.SIGINT, 15)), *COMMANDS["eigs"]]) == 1
    out, err = capsys.readouterr()
    assert "EigenResult" in out
    assert err == ""


@pytest.mark.parametrize("command", ["eigs", "trace", "density"])
def test_nothing_is_left_of_a_run_that_is_stopped_in_its_first_product(command, spec, capsys):
    assert main([command, spec(by_signal(signal.SIGINT, 1))]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "stopped before there was anything to save\n")


def test_a_run_that_is_stopped_while_it_begins_again_keeps_its_state(spec, tmp_path, capsys):
    words = [*COMMANDS["eigs"], "--out", str(tmp_path / "a.safetensors")]
    assert main(["eigs", spec(source()), *words, "--max-matvecs", "20"]) == 1
    assert main(["eigs", spec(by_signal(signal.SIGINT, 1)), *words, "--resume"]) == 1
    assert "has what was found, to go on from it pass --resume" in capsys.readouterr().err


def test_ctrl_c_in_build_is_no_traceback(spec, capsys):
    assert main(["eigs", spec("def build(): raise KeyboardInterrupt")]) == 1
    assert capsys.readouterr().err == "stopped before there was a result\n"


def test_a_partial_trace_is_not_converged(spec, capsys):
    made = spec(by_signal(signal.SIGINT, 40))
    assert main(["trace", made, "--method", "hutchinson", "--max-matvecs", "200"]) == 1
    assert "interrupted after" in capsys.readouterr().out


def test_a_signal_between_products_waits_for_the_next(capsys):
    from torchlinop import MatrixOperator
    from torchlinop.command_line.interruption import interruptible

    with interruptible(MatrixOperator(torch.eye(3))) as A:
        signal.raise_signal(signal.SIGINT)
        assert "stopping at the next product" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            A @ torch.ones(3)
        assert torch.equal(A @ torch.ones(3), torch.ones(3))
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):  # the second time, at once
            signal.raise_signal(signal.SIGINT)


def test_the_handlers_of_signals_are_put_back():
    from torchlinop import MatrixOperator
    from torchlinop.command_line.interruption import interruptible

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with interruptible(MatrixOperator(torch.eye(3))) as A:
        assert repr(A) == repr(MatrixOperator(torch.eye(3)))
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.fixture
def stopped(spec, tmp_path, capsys):
    """The words of a command that was stopped, its result and its checkpoint."""
    out = tmp_path / "a.safetensors"
    words = ["eigs", spec(source()), *COMMANDS["eigs"], "--out", str(out)]
    assert main([*words, "--max-matvecs", "20"]) == 1
    capsys.readouterr()
    return words, out, out.with_suffix(".checkpoint")


def test_a_run_that_was_stopped_is_not_begun_anew_unasked(stopped, capsys):
    words, out, state = stopped
    before = out.read_bytes(), state.read_bytes()
    assert main(words) == 2
    assert "holds an unfinished run; pass --resume to go on with it" in capsys.readouterr().err
    assert (out.read_bytes(), state.read_bytes()) == before
    assert main([*words, "--overwrite", "-k", "0"]) == 2
    assert (out.read_bytes(), state.read_bytes()) == before
    assert main([*words, "--overwrite"]) == 0
    assert not [path for path in out.parent.iterdir() if "checkpoint" in path.name]


def test_a_run_of_other_options_is_not_gone_on_with(stopped, capsys):
    words, out, state = stopped
    before = out.read_bytes(), state.read_bytes()
    assert main([*words, "--resume", "--seed", "1"]) == 2
    assert "is of seed=0, expected seed=1" in capsys.readouterr().err
    assert (out.read_bytes(), state.read_bytes()) == before


def test_a_run_of_another_algorithm_is_not_gone_on_with(stopped, capsys):
    (_, made, *_), out, state = stopped
    assert main(["density", made, "--out", str(out), "--resume"]) == 2
    assert f"{state} is of algorithm=lanczos, expected algorithm=slq; pass" in (
        capsys.readouterr().err
    )


def test_a_run_of_another_matrix_is_not_gone_on_with(stopped, spec, capsys):
    words, _, _ = stopped
    other = spec(source().replace("neural(300)", "neural(300).flip(0) * 2"))
    assert main(["eigs", other, *words[2:], "--resume"]) == 2
    assert "the matrix is not that of the checkpoint" in capsys.readouterr().err


def test_a_finished_run_is_not_resumed(stopped, capsys):
    words, out, _ = stopped
    assert main([*words, "--resume"]) == 0
    assert main([*words, "--resume"]) == 2
    assert f"{out} is finished: there is no" in capsys.readouterr().err


def test_resuming_what_was_never_begun_begins(spec, tmp_path):
    words = [*COMMANDS["eigs"], "--out", str(tmp_path / "a.safetensors"), "--resume"]
    assert main(["eigs", spec(source()), *words]) == 0


@pytest.mark.parametrize("words", [[], ["--out", "a.safetensors", "--no-checkpoint"]])
def test_resuming_needs_a_checkpoint(words, spec, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["eigs", spec(source()), *words, "--resume"]) == 2
    assert "--resume goes on from the checkpoint beside --out; pass" in capsys.readouterr().err


def test_no_state_is_saved_if_none_is_wanted(spec, tmp_path, capsys):
    out = tmp_path / "a.safetensors"
    words = [*COMMANDS["eigs"], "--out", str(out), "--no-checkpoint", "--max-matvecs", "20"]
    assert main(["eigs", spec(source()), *words]) == 1
    assert out.exists()
    assert not out.with_suffix(".checkpoint").exists()
    assert capsys.readouterr().err == ""
