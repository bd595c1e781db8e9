"""On a trained model and real data, SciPy's solvers give the dense Hessian's answers."""

import functools
import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.sparse import linalg as sla

from torchlinop import HessianOperator, as_linear_operator, match_names
from torchlinop.demo import digits_mlp
from torchlinop.testing.oracles import dense_hessian

DTYPES = [(torch.float64, 1e-10), (torch.float32, 1e-5)]
DAMPING = 0.1


@functools.cache
def dense(only_last_layer=False):
    """The float64 Hessian of the model trained in float64."""
    p = digits_mlp()
    parameters = list(p.model[2].parameters()) if only_last_layer else p.parameters
    return dense_hessian(p.full_loss, parameters, rows_at_once=64).numpy()


def hessian(dtype, **options):
    """The operator of the same model and data, rounded to ``dtype``."""
    p = digits_mlp()
    batches = [(x.to(dtype), y) for x, y in p.batches]
    return HessianOperator(p.model.to(dtype), batches, p.loss_fn, **options)


@functools.cache
def last_layer(dtype):
    return hessian(dtype, param_filter=match_names("2.*"))


def relative(value, truth):
    return np.linalg.norm(value - truth) / np.linalg.norm(truth)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_the_main_sentence_gives_the_ten_largest_eigenvalues(dtype, tolerance):
    A = as_linear_operator(hessian(dtype))
    eigenvalues, vectors = sla.eigsh(A, k=10, v0=np.ones(1810, A.dtype))
    truth = scipy.linalg.eigvalsh(dense())[-10:]  # the largest in modulus are positive here
    assert np.abs(eigenvalues - truth).max() < tolerance * truth.max()
    residuals = np.linalg.norm(dense() @ vectors - vectors * eigenvalues, axis=0)
    assert residuals.max() < 10 * tolerance * truth.max()


EIGENSOLVERS = {
    "eigsh LA": lambda A, X, tol: sla.eigsh(A, 5, which="LA", v0=X[:, 0])[0],
    "lobpcg": lambda A, X, tol: np.sort(sla.lobpcg(A, X, tol=tol, maxiter=300)[0])[-5:],
    "svds arpack": lambda A, X, tol: np.sort(sla.svds(A, 5, v0=X[:, 0])[1]),
    # Its lobpcg works on A^2, so that its residuals are relative to the square of the norm.
    "svds lobpcg": lambda A, X, tol: np.sort(
        sla.svds(A, 5, v0=X[:, 0], solver="lobpcg", maxiter=200, tol=10 * tol)[1]
    ),
    "svds propack": lambda A, X, tol: np.sort(sla.svds(A, 5, v0=X[:, 0], solver="propack")[1]),
}


@pytest.mark.parametrize("name", EIGENSOLVERS)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_eigensolvers_agree_with_the_dense_answer(name, dtype, tolerance):
    A = as_linear_operator(last_layer(dtype))
    X = np.random.default_rng(0).standard_normal((A.shape[0], 8)).astype(A.dtype)
    truth = scipy.linalg.eigvalsh(dense(only_last_layer=True))[-5:]
    # lobpcg stops on residuals, of which eigenvalue errors are the square.
    values = EIGENSOLVERS[name](A, X, tolerance**0.5 / 10)
    assert relative(values, truth) < 10 * tolerance


LINEAR_SOLVERS = {
    "cg": lambda A, b, M, rtol: sla.cg(A, b, rtol=rtol),
    "minres": lambda A, b, M, rtol: sla.minres(A, b, rtol=rtol / 100, maxiter=2000),
    "gmres": lambda A, b, M, rtol: sla.gmres(A, b, rtol=rtol, restart=60),
    "lgmres": lambda A, b, M, rtol: sla.lgmres(A, b, rtol=rtol, maxiter=500),
    "gcrotmk": lambda A, b, M, rtol: sla.gcrotmk(A, b, rtol=rtol, maxiter=500),
    "bicgstab with M": lambda A, b, M, rtol: sla.bicgstab(A, b, rtol=rtol, M=M),
    "lsmr": lambda A, b, M, rtol: (sla.lsmr(A, b, atol=rtol / 100, btol=rtol / 100)[0], 0),
}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # lsmr's 1e100
@pytest.mark.parametrize("name", LINEAR_SOLVERS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_linear_solvers_agree_with_the_dense_answer(name, dtype, rtol):
    H = last_layer(dtype).shift(DAMPING)
    A = as_linear_operator(H)
    b = np.random.default_rng(1).standard_normal(A.shape[0]).astype(A.dtype)
    preconditioner = as_linear_operator(1 / (1 + DAMPING) * H)
    x, info = LINEAR_SOLVERS[name](A, b, preconditioner if "M" in name else None, rtol)
    assert info == 0
    damped = dense(only_last_layer=True) + DAMPING * np.eye(A.shape[0])
    # A residual of rtol |b| is an error of at most cond rtol |x|; cond is about 3.3 / 0.1.
    assert relative(x, np.linalg.solve(damped, b)) < 40 * rtol


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_shift_invert_with_an_inverse_finds_the_eigenvalues_next_to_sigma(dtype, tolerance):
    A = as_linear_operator(last_layer(dtype))
    matrix, sigma = dense(only_last_layer=True), 1.0
    inverse = np.linalg.inv(matrix - sigma * np.eye(A.shape[0])).astype(A.dtype)
    values = sla.eigsh(
        A, 3, sigma=sigma, OPinv=sla.aslinearoperator(inverse), v0=np.ones(A.shape[0], A.dtype)
    )[0]
    exact = scipy.linalg.eigvalsh(matrix)
    nearest = np.sort(exact[np.argsort(np.abs(exact - sigma))[:3]])
    assert relative(np.sort(values), nearest) < 10 * tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_gradient_flow_is_the_dense_exponential(dtype, tolerance):
    A = -1.0 * as_linear_operator(last_layer(dtype))
    v = np.random.default_rng(2).standard_normal(A.shape[0]).astype(A.dtype)
    matrix = dense(only_last_layer=True)
    moved = sla.expm_multiply(A, v, traceA=-np.trace(matrix))
    assert relative(moved, scipy.linalg.expm(-matrix) @ v) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_the_estimated_one_norm_is_a_column_sum_of_the_matrix(dtype, tolerance):
    matrix = np.abs(dense(only_last_layer=True)).sum(0)
    estimate = sla.onenormest(as_linear_operator(last_layer(dtype)))
    assert matrix.max() / 3 <= estimate <= matrix.max() * (1 + tolerance)


def test_the_demo_is_seeded_and_gives_copies():
    a, b = digits_mlp(), digits_mlp()
    assert a.model is not b.model
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert [len(batch[1]) for batch in a.batches] == [256] * 7 + [5]
    accuracy = (a.model(a.full_batch[0]).argmax(1) == a.full_batch[1]).double().mean()
    assert accuracy > 0.9


def test_the_demo_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .torchlinop\[demo\]"):
        digits_mlp(steps=2, seed=9)


def test_training_the_demo_leaves_the_random_state_alone():
    before = torch.random.get_rng_state()
    digits_mlp(steps=1, seed=5)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_readmes_first_command_prints_ten_eigenvalues_beside_the_dense_answer():
    done = subprocess.run(
        [sys.executable, "-m", "torchlinop.demo"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    rows = [line.split() for line in done.stdout.splitlines()[-10:]]
    truth = scipy.linalg.eigvalsh(dense())[::-1][:10]
    np.testing.assert_allclose([float(row[1]) for row in rows], truth, atol=1e-9)
    assert all(float(row[2]) < 1e-10 and float(row[4]) < 1e-10 for row in rows)
