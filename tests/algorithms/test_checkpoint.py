"""A run continued from its file ends bit by bit as one that was never interrupted."""

import functools
import math
import sys

import numpy as np
import pytest
import torch
from eigen_spectra import matrix, spectrum

from torchlinop import CountingOperator, HessianOperator, LambdaOperator, MatrixOperator
from torchlinop.algorithms.checkpoint import Checkpoint
from torchlinop.algorithms.lanczos import lanczos
from torchlinop.errors import NotConvergedWarning, OptionError
from torchlinop.testing import gallery

PROBLEM = {"n": 300, "dtype": torch.float64, "seed": 0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex128])
def test_a_file_gives_back_tensors_and_numbers_bit_by_bit(tmp_path, dtype):
    checkpoint = Checkpoint(tmp_path / "run.safetensors", PROBLEM)
    assert checkpoint.load() is None
    V = torch.randn(3, 5).to(dtype)
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


def test_integers_of_numpy_are_the_same_problem_as_those_of_python(tmp_path):
    path = tmp_path / "run.safetensors"
    Checkpoint(path, {"k": np.int64(3)}).save({"V": torch.ones(2)}, {})
    assert Checkpoint(path, {"k": 3}).load() is not None


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    path.write_bytes(b"something else")
    with pytest.raises(OptionError, match="as a safetensors file"):
        Checkpoint(path, PROBLEM).load()
    lanczos(MatrixOperator(torch.eye(4)), 1).save(path)
    with pytest.raises(
        OptionError, match=r"expected a checkpoint in .*, got another file of torch"
    ):
        Checkpoint(path, PROBLEM).load()


def test_what_cannot_be_written_is_refused_before_a_run(tmp_path, monkeypatch):
    with pytest.raises(OptionError, match=r"expected checkpoint to be .* directory that exists"):
        Checkpoint(tmp_path / "missing" / "run.safetensors", PROBLEM).load()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(OptionError, match="needs safetensors; run: pip install safetensors"):
        Checkpoint(tmp_path / "run.safetensors", PROBLEM).load()


@functools.cache
def problem(name, dtype):
    return matrix(spectrum(name, 200), dtype)


def interrupted_at(product, A):
    """The matrix, whose user loses patience in this product; never, if it is zero."""
    count = [0]

    def matmat(V):
        count[0] += 1
        if count[0] == product:
            raise KeyboardInterrupt
        return A @ V

    return LambdaOperator(len(A), lambda v: matmat(v[:, None])[:, 0], matmat=matmat, dtype=A.dtype)


def assert_equal(result, expected):
    names = ("eigenvalues", "eigenvectors", "residual_norms", "converged", "history_residuals")
    for name in names:
        ours, theirs = getattr(result, name), getattr(expected, name)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    for name in ("status", "matvecs", "matmats", "restarts", "basis_size"):
        assert getattr(result, name) == getattr(expected, name)


# The matrix, its dtype, options, and the call in which the run is interrupted.
RUNS = [
    ("nnhard", torch.float64, {}, 2),
    ("nnhard", torch.float64, {}, 7),  # before the first restart
    ("nnhard", torch.float64, {}, 14),  # right after it
    ("nnhard", torch.float64, {"k": 8}, 30),
    ("nnhard", torch.float32, {}, 15),
    ("nnhard", torch.complex128, {}, 15),
    ("nnhard", torch.float64, {"block_size": 3}, 8),
    ("nnhard", torch.float64, {"verify": True}, 20),
    ("nnhard", torch.float32, {"basis_dtype": torch.bfloat16, "tol": 0.02}, 12),
    ("1 and 50", torch.float64, {"basis_dtype": torch.float16, "block_size": 2}, 3),
    ("rank 5", torch.float64, {}, 5),
    ("rank 5", torch.float64, {"k": 7}, 8),  # after vectors were replaced
    ("identity", torch.float32, {"block_size": 3}, 3),
    ("zero", torch.float64, {}, 3),
]


@pytest.mark.filterwarnings("ignore::torchlinop.errors.NotConvergedWarning")
@pytest.mark.parametrize(("name", "dtype", "options", "product"), RUNS)
def test_a_run_interrupted_and_continued_is_that_without_a_stop(
    name, dtype, options, product, tmp_path
):
    A, path = problem(name, dtype), tmp_path / "run.safetensors"
    options = {"k": 5, "which": "LA", "ncv": 12, **options}
    expected = lanczos(interrupted_at(0, A), **options)
    stopped = lanczos(interrupted_at(product, A), checkpoint=path, **options)
    assert stopped.status == "interrupted"
    assert_equal(lanczos(interrupted_at(0, A), checkpoint=path, **options), expected)


def test_budgets_may_grow_from_call_to_call(tmp_path):
    A, path = MatrixOperator(problem("nnhard", torch.float64)), tmp_path / "run.safetensors"
    options = {"k": 8, "which": "LA", "ncv": 12}
    expected = lanczos(A, **options)
    for budget in ({"max_iter": 9}, {"max_iter": 17}, {"max_iter": 30}, {"max_seconds": 1e-9}):
        with pytest.warns(NotConvergedWarning):
            lanczos(A, **options, **budget, checkpoint=path)
    assert_equal(lanczos(A, **options, checkpoint=path), expected)


def test_a_run_that_is_over_gives_its_result_for_one_product(tmp_path):
    A, path = MatrixOperator(problem("nn", torch.float64)), tmp_path / "run.safetensors"
    expected = lanczos(A, 5, which="LA", checkpoint=path)
    counted = CountingOperator(A)
    assert_equal(lanczos(counted, 5, which="LA", checkpoint=path), expected)
    assert counted.matvecs == 1


def test_a_run_killed_between_restarts_goes_on_from_the_last_one(tmp_path):
    A, path = problem("nnhard", torch.float64), tmp_path / "run.safetensors"
    products = [0]

    def matvec(v):
        products[0] += 1
        if products[0] == 20:
            raise OSError("out of power")
        return A @ v

    options = {"k": 5, "which": "LA", "ncv": 12, "checkpoint": path}
    with pytest.raises(OSError, match="power"):
        lanczos(LambdaOperator(200, matvec, dtype=torch.float64), **options)
    continued = lanczos(interrupted_at(0, A), **options)
    assert_equal(continued, lanczos(interrupted_at(0, A), 5, which="LA", ncv=12))


def test_automatic_blocks_stay_as_they_were_begun(tmp_path):
    A, path = problem("nnhard", torch.float64), tmp_path / "run.safetensors"
    options = {"k": 5, "which": "LA", "block_size": "auto", "checkpoint": path}
    with pytest.warns(NotConvergedWarning):
        stopped = lanczos(interrupted_at(9, A), **options)
    continued = lanczos(interrupted_at(0, A), **options)
    assert continued.method == stopped.method
    torch.testing.assert_close(continued.eigenvalues, spectrum("nnhard", 200)[:5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 4}, r"is of k=5, expected k=4; pass another path, or delete the file"),
        ({"which": "SA", "seed": 1}, r"is of which=LA, seed=0, expected which=SA, seed=1"),
        ({"tol": 1e-3}, r"is of tol=1e-06, expected tol=0.001"),
        ({"reorthogonalize": "local"}, r"'local' cannot be continued from a checkpoint; leave"),
    ],
)
def test_other_options_than_those_of_the_file_are_refused_before_any_product(
    change, message, tmp_path
):
    A, path = MatrixOperator(problem("nn", torch.float64)), tmp_path / "run.safetensors"
    options = {"k": 5, "which": "LA", "checkpoint": path}
    lanczos(A, **options)
    counted = CountingOperator(A)
    with pytest.raises(OptionError, match=message):
        lanczos(counted, **{**options, **change})
    assert counted.matvecs == 0


@pytest.mark.parametrize("stored", [None, torch.bfloat16])
def test_another_matrix_than_that_of_the_file_is_refused_after_a_few_products(stored, tmp_path):
    A, path = problem("nn", torch.float64), tmp_path / "run.safetensors"
    options = {"k": 5, "which": "LA", "basis_dtype": stored, "checkpoint": path, "tol": 1e-2}
    lanczos(MatrixOperator(A), **options)
    other = CountingOperator(MatrixOperator(0.9 * A if stored else A * (1 + 1e-12)))
    with pytest.raises(OptionError, match="is not that of the checkpoint: a product differs by"):
        lanczos(other, **options)
    assert other.matvecs == 1 + 6  # which see how noisy products are


@pytest.mark.parametrize("max_iter", [8, 12, 20])
@pytest.mark.filterwarnings("ignore::torchlinop.errors.TorchlinopWarning")
def test_the_noise_of_differences_is_not_taken_for_another_matrix(max_iter, tmp_path):
    p = gallery.mlp()
    H = HessianOperator(p.model, p.batches, p.loss_fn, method="finite_difference")
    options = {"k": 3, "ncv": 8, "tol": 1e-9, "checkpoint": tmp_path / "run.safetensors"}
    lanczos(H, max_iter=max_iter, **options)
    assert lanczos(H, max_iter=24, **options).matvecs == 24
