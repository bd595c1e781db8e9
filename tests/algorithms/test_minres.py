"""MINRES solves indefinite systems, never lets the residual grow, and knows least squares."""

import numpy as np
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


def both_signs(n):
    return torch.linspace(0.2, 1, n // 5).repeat(4) * torch.tensor([1.0, 1, 1, -1]).repeat(n // 5)


SINGULAR = {  # of n eigenvalues, those that may not be zero
    "one zero": lambda n: torch.linspace(0.5, 2, n - 1),
    "a fifth zero": lambda n: torch.linspace(0.5, 2, 4 * n // 5),
    "indefinite": both_signs,
    "pairs": lambda n: torch.tensor([-1.0, 1.0]).repeat(n // 4),
    "rank one": lambda n: torch.tensor([3.0]),
    "zero": lambda n: torch.zeros(1),
    "outliers": lambda n: torch.cat([torch.linspace(0.3, 0.5, n // 2), torch.arange(2.0, 7.0)]),
}


@pytest.mark.parametrize("spectrum", SINGULAR)
@pytest.mark.parametrize("n", [20, 100, 400])
@pytest.mark.parametrize(
    ("dtype", "scale"), [(F64, 1.0), (F64, 1e-9), (torch.float32, 1.0), (torch.float32, 1e6)]
)
def test_an_inconsistent_system_ends_with_the_shortest_least_squares_solution(
    spectrum, n, dtype, scale
):
    eigenvalues = torch.zeros(n, dtype=F64)
    given = SINGULAR[spectrum](n)
    eigenvalues[: len(given)] = given
    A = scale * with_spectrum(eigenvalues)[0]
    b = right_hand_sides(n, 1)[:, 0]
    with pytest.warns(NotConvergedWarning, match=r"singular\)\. The vector b is not in the range"):
        result = minres(MatrixOperator(A.to(dtype)), b.to(dtype))
    assert result.status == ("singular",)
    x, *_ = np.linalg.lstsq(A.numpy(), b.numpy(), rcond=1e-6)
    least = np.linalg.norm(b.numpy() - A.numpy() @ x)
    flat = 10 * torch.finfo(dtype).eps ** 0.5  # ‖A r‖ / (‖A‖ ‖r‖), over the least |λ| of 0.05 ‖A‖
    assert float(result.residual_norms) <= (1 + flat) * least
    assert np.linalg.norm(result.x.double().numpy() - x) <= 20 * flat * np.linalg.norm(x)


def test_an_ill_conditioned_but_consistent_system_is_not_taken_for_singular():
    A = with_spectrum(torch.logspace(-6, 0, 100, dtype=F64))[0]
    result = minres(MatrixOperator(A), right_hand_sides(100), max_iter=3000)
    assert result.converged.all()


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_residual_is_never_larger_than_that_of_zero(dtype):
    A = with_spectrum(torch.logspace(-9, 0, 100, dtype=F64))[0].to(dtype)
    with pytest.warns(NotConvergedWarning):
        result = minres(MatrixOperator(A), right_hand_sides(100).to(dtype))
    assert (result.relative_residuals <= 1).all()
