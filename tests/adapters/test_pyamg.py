"""pyamg takes the SciPy adapter: its Krylov methods solve, its estimates bound the spectrum."""

import numpy as np
import pytest
import torch

from torchlinop import GGNOperator, LambdaOperator, MatrixOperator, as_linear_operator
from torchlinop.testing import RotatedOperator
from torchlinop.testing.gallery import mlp, of_inputs

pyamg = pytest.importorskip("pyamg")
krylov = pytest.importorskip("pyamg.krylov")

N = 40
POSITIVE = torch.linspace(1, 10, N, dtype=torch.float64)
INDEFINITE = torch.cat([-POSITIVE[: N // 4], POSITIVE[N // 4 :]])
POSITIVE_METHODS = ["cg", "cr", "steepest_descent", "minimal_residual"]
# Not cgne and cgnr, which conjugate their operator by NumPy: no LinearOperator can be.
GENERAL_METHODS = ["gmres", "fgmres", "bicgstab"]

precisions = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)]
)


def gaussian(*shape, dtype=np.float64):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def assert_solved(method, eigenvalues, dtype, tolerance):
    op = RotatedOperator(eigenvalues.to(dtype))
    A = as_linear_operator(op)
    b = gaussian(N, dtype=A.dtype)
    options = {} if "gmres" in method else {"maxiter": 400}
    x, info = getattr(krylov, method)(A, b, tol=tolerance / 10, **options)
    assert info == 0
    assert x.dtype == b.dtype
    expected = np.linalg.solve(op.to_dense().double().numpy(), b)
    assert np.linalg.norm(x - expected) <= 10 * tolerance * np.linalg.norm(expected)


@precisions
@pytest.mark.parametrize("method", POSITIVE_METHODS)
def test_positive_definite_systems_are_solved(method, dtype, tolerance):
    assert_solved(method, POSITIVE, dtype, tolerance)


@precisions
@pytest.mark.parametrize("method", GENERAL_METHODS)
def test_indefinite_systems_are_solved(method, dtype, tolerance):
    assert_solved(method, INDEFINITE, dtype, tolerance)


def test_a_preconditioner_of_ours_saves_products():
    # Badly scaled, so that the diagonal is a good preconditioner.
    d = torch.logspace(0, 4, N, dtype=torch.float64)
    matrix = torch.diag(d) + 0.1
    inverse = as_linear_operator(LambdaOperator(N, lambda v: v / d, dtype=torch.float64))
    plain, preconditioned = (as_linear_operator(MatrixOperator(matrix)) for _ in range(2))
    b = gaussian(N)
    krylov.cg(plain, b, tol=1e-10, maxiter=400)
    x, info = krylov.cg(preconditioned, b, tol=1e-10, M=inverse)
    assert info == 0
    assert preconditioned.matvecs < plain.matvecs / 2
    np.testing.assert_allclose(matrix.numpy() @ x, b, rtol=0, atol=1e-6)


@precisions
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_spectral_radius_is_approximated(symmetric, dtype, tolerance):
    A = as_linear_operator(RotatedOperator(INDEFINITE.to(dtype)))
    guess = gaussian(N, 1, dtype=A.dtype)
    radius = pyamg.util.linalg.approximate_spectral_radius(
        A, tol=tolerance * 10, maxiter=20, restart=10, symmetric=symmetric, initial_guess=guess
    )
    assert radius == pytest.approx(10, rel=1e-4)


def test_a_damped_step_of_a_network_is_that_of_the_dense_matrix():
    p = mlp()
    G = GGNOperator(p.model, p.batches, of_inputs, p.criterion).shift(0.1)
    b = gaussian(G.size)
    x, info = krylov.cg(as_linear_operator(G), b, tol=1e-12)
    assert info == 0
    np.testing.assert_allclose(x, np.linalg.solve(G.to_dense().numpy(), b), rtol=0, atol=1e-9)
