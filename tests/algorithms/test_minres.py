"""MINRES solves indefinite systems, never lets the residual grow, and knows least squares."""

import pytest
import torch
from scipy.sparse.linalg import minres as scipy_minres

from torchlinop import MatrixOperator
from torchlinop.algorithms.minres import minres
from torchlinop.errors import NotConvergedWarning
from torchlinop.testing.gallery import with_spectrum

F64 = torch.float64
INDEFINITE = torch.cat(
    [-torch.logspace(-1, 0, 30, dtype=F64), torch.logspace(-1, 1, 70, dtype=F64)]
)


def right_hand_sides(n, columns=3):
    return torch.randn(n, columns, generator=torch.Generator().manual_seed(1), dtype=F64)


@pytest.mark.parametrize(("dtype", "rtol"), [(F64, 1e-10), (torch.float32, 1e-4)])
def test_indefinite_systems_are_solved(dtype, rtol):
    A = with_spectrum(INDEFINITE)[0].to(dtype)
    B = right_hand_sides(100).to(dtype)
    result = minres(MatrixOperator(A), B, rtol=rtol)
    assert result.converged.all()
    exact = torch.linalg.solve(A.double(), B.double())
    assert (result.x - exact).norm() <= 200 * rtol * exact.norm()


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 13])
def test_residuals_are_least_in_the_krylov_space(steps):
    A = with_spectrum(INDEFINITE)[0]
    b = right_hand_sides(100, 1)[:, 0]
    with pytest.warns(NotConvergedWarning, match=r"max_iter\)\. Raise max_iter or damping"):
        result = minres(MatrixOperator(A), b, max_iter=steps, rtol=1e-12)
    krylov = torch.stack([torch.linalg.matrix_power(A / 10, p) @ b for p in range(steps)], 1)
    AQ = A @ torch.linalg.qr(krylov)[0]
    least = (b - AQ @ torch.linalg.lstsq(AQ, b[:, None]).solution[:, 0]).norm()
    assert float(result.residual_norms) == pytest.approx(float(least), rel=1e-8)


def test_iterates_are_those_of_scipy():
    A = with_spectrum(INDEFINITE)[0]
    b = right_hand_sides(100, 1)[:, 0]
    with pytest.warns(NotConvergedWarning):
        ours = minres(MatrixOperator(A), b, max_iter=20, rtol=1e-12).x
    theirs, _ = scipy_minres(A.numpy(), b.numpy(), maxiter=20, rtol=1e-15)
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-10, atol=1e-10)


def test_an_indefinite_system_is_solved_with_a_definite_preconditioner():
    A, Q = with_spectrum(INDEFINITE)
    M = MatrixOperator((Q / INDEFINITE.abs()) @ Q.T)  # M A has eigenvalues ±1
    B = right_hand_sides(100)
    result = minres(MatrixOperator(A), B, preconditioner=M, rtol=1e-10)
    assert result.iterations.max() <= 3
    torch.testing.assert_close(result.x, torch.linalg.solve(A, B), rtol=1e-8, atol=1e-8)


def test_an_inconsistent_system_ends_near_least_squares_with_a_warning():
    eigenvalues = torch.cat([torch.zeros(20, dtype=F64), torch.linspace(0.5, 2, 80, dtype=F64)])
    A, Q = with_spectrum(eigenvalues)
    b = right_hand_sides(100, 1)[:, 0]
    with pytest.warns(NotConvergedWarning, match="0 of 1 systems"):
        result = minres(MatrixOperator(A), b)
    least = (Q[:, :20].T @ b).norm()  # what no x can reach
    assert float(result.residual_norms) == pytest.approx(float(least), rel=1e-2)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_residual_is_never_larger_than_that_of_zero(dtype):
    A = with_spectrum(torch.logspace(-9, 0, 100, dtype=F64))[0].to(dtype)
    with pytest.warns(NotConvergedWarning):
        result = minres(MatrixOperator(A), right_hand_sides(100).to(dtype))
    assert (result.relative_residuals <= 1).all()
