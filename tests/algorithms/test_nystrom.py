"""U Λ Uᵀ is never above A ≥ 0, equals it for low rank, and its inverse is a preconditioner."""

import pytest
import torch
from eigen_spectra import F64, matrix, spectrum

from torchlinop import CountingOperator, LambdaOperator, MatrixOperator
from torchlinop.algorithms.conjugate_gradient import conjugate_gradient
from torchlinop.algorithms.nystrom import nystrom
from torchlinop.errors import DefinitenessError, NonFiniteError, OptionError


def error(N, A):
    return torch.linalg.matrix_norm(N.to_dense().double() - A, 2)


@pytest.mark.parametrize("scale", [1, 1e-12, 1e12])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("name", "rank"), [("rank 1", 1), ("rank 5", 5), ("zero", 0)])
def test_a_matrix_of_low_rank_is_its_own_approximation(name, rank, dtype, tolerance, scale):
    A = scale * matrix(spectrum(name, 200))
    N = nystrom(MatrixOperator(A.to(dtype)), 12)
    assert len(N.eigenvalues) == rank
    assert N.beyond == 0
    assert error(N, A) <= tolerance * 10 * scale


@pytest.mark.parametrize("name", ["poly", "slow"])
def test_the_approximation_is_never_above_and_near_the_best(name):
    eigenvalues = spectrum(name, 200)
    A = matrix(eigenvalues)
    N = nystrom(MatrixOperator(A), 40, shift=0.0)
    left = torch.linalg.eigvalsh(A - N.to_dense())
    assert left[0] >= -1e-14
    assert left[-1] <= 3 * eigenvalues[20]
    gram = N.U.T @ N.U
    torch.testing.assert_close(gram, torch.eye(len(gram), dtype=F64), rtol=0, atol=1e-13)


def test_the_smallest_eigenvalue_found_stands_for_all_that_is_left():
    N = nystrom(MatrixOperator(matrix(spectrum("slow", 200))), 20)
    values = torch.linalg.eigvalsh(N.to_dense())
    assert N.beyond == float(N.eigenvalues[-1])
    torch.testing.assert_close(values[:181], torch.full((181,), N.beyond, dtype=F64))
    torch.testing.assert_close(values[180:].flip(0), N.eigenvalues)


@pytest.mark.parametrize("shift", [None, 0.0, 0.5])
def test_inverse_is_the_inverse_of_the_dense_matrix(shift):
    N = nystrom(MatrixOperator(matrix(spectrum("poly", 100))), 10, shift=shift)
    expected = torch.linalg.inv(N.to_dense() + 0.1 * torch.eye(100, dtype=F64))
    torch.testing.assert_close(N.inverse(0.1).to_dense(), expected, rtol=1e-11, atol=1e-11)


def test_preconditioned_conjugate_gradients_take_a_fraction_of_the_iterations():
    op, b = MatrixOperator(matrix(spectrum("poly", 500))), torch.ones(500, dtype=F64)
    M = nystrom(op, 60).inverse(1e-4)
    plain = conjugate_gradient(op, b, damping=1e-4, rtol=1e-8)
    fast = conjugate_gradient(op, b, damping=1e-4, rtol=1e-8, preconditioner=M)
    assert fast.converged.all()
    assert int(fast.iterations) <= int(plain.iterations) / 3


def test_products_are_as_many_as_announced():
    counting = CountingOperator(MatrixOperator(matrix(spectrum("slow", 200))))
    nystrom(counting, 7)
    assert counting.matvecs == 7 + 10


@pytest.mark.parametrize(
    "eigenvalues",
    [spectrum("nn", 200), torch.cat([torch.tensor([-1.5]), torch.ones(199)]).double()],
    ids=["nn", "one below a flat bulk"],
)
def test_a_negative_eigenvalue_is_refused(eigenvalues):
    with pytest.raises(DefinitenessError, match=r"was met in .* expected no negative eigenvalue"):
        nystrom(MatrixOperator(matrix(eigenvalues)), 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "expected rank from 1 to n = 50, got 0"),
        ({"rank": 51}, "expected rank from 1 to n = 50, got 51"),
        ({"shift": -1.0}, "expected shift to be finite and at least 0, got -1.0"),
    ],
)
def test_bad_options_are_refused_before_a_product(options, message):
    counting = CountingOperator(MatrixOperator(matrix(spectrum("poly", 50))))
    with pytest.raises(OptionError, match=message):
        nystrom(counting, **options)
    assert counting.matvecs == 0


def test_a_complex_operator_is_refused():
    with pytest.raises(OptionError, match="expected a real operator"):
        nystrom(MatrixOperator(torch.eye(9, dtype=torch.complex128)), 2)


def test_an_inverse_that_does_not_exist_is_refused():
    N = nystrom(MatrixOperator(matrix(spectrum("rank 5", 50))), 10)
    with pytest.raises(OptionError, match="expected a finite damping above"):
        N.inverse(0.0)


def test_products_that_are_not_finite_are_named():
    with pytest.raises(NonFiniteError, match="is NaN or infinite"):
        nystrom(LambdaOperator(50, lambda v: v * torch.nan, dtype=F64), 3)
