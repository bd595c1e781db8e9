"""A randomized range finder is exact for low rank, and tells by residuals how far it is else."""

from itertools import pairwise

import pytest
import scipy.sparse
import torch
from eigen_spectra import F64, assert_honest, matrix, spectrum

from torchlinop import CountingOperator, LambdaOperator, MatrixOperator, from_linear_operator
from torchlinop.algorithms.randomized_eigh import randomized_eigh
from torchlinop.errors import NonFiniteError, OptionError, SymmetryError


@pytest.mark.parametrize("scale", [1, 1e-12, 1e12])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("name", ["zero", "identity", "rank 1", "rank 5"])
def test_it_is_exact_where_the_rank_is_within_the_sketch(name, dtype, scale):
    eigenvalues = scale * spectrum(name, 200)
    A = matrix(eigenvalues, dtype)
    result = randomized_eigh(MatrixOperator(A), 6, power_iterations=0)
    assert result.status == "converged"
    rounding = 10 * torch.finfo(dtype).eps * eigenvalues.abs().max()
    assert ((result.eigenvalues - eigenvalues[:6]).abs() <= rounding).all()
    assert_honest(result, A, eigenvalues[:6])


@pytest.mark.parametrize("power", [-100, 100])
def test_a_power_of_two_that_cannot_be_squared_changes_nothing_but_the_scale(power):
    A = matrix(spectrum("nn", 200), torch.float32)
    result, scaled = (randomized_eigh(MatrixOperator(2.0**p * A), 6) for p in (0, power))
    assert torch.equal(scaled.eigenvectors, result.eigenvectors)
    assert torch.equal(scaled.eigenvalues, 2.0**power * result.eigenvalues)
    assert torch.equal(scaled.residual_norms, 2.0**power * result.residual_norms)


@pytest.mark.parametrize("name", ["poly", "slow", "cluster", "nn"])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_residuals_say_how_far_it_is(name, dtype):
    eigenvalues = spectrum(name, 300)
    A = matrix(eigenvalues, dtype)
    assert_honest(randomized_eigh(MatrixOperator(A), 10), A, eigenvalues[:10])


def test_each_power_iteration_divides_residuals_by_the_ratio_of_eigenvalues():
    # λ = 1 (10 times) above 0.1: a residual is of A^q Ω's part outside, 0.1^q of the first.
    eigenvalues = torch.where(torch.arange(300) < 10, 1.0, 0.1).double()
    op = MatrixOperator(matrix(eigenvalues))
    worst = [
        float(randomized_eigh(op, 10, power_iterations=q).residual_norms.max()) for q in range(1, 5)
    ]
    for before, after in pairwise(worst):
        assert after == pytest.approx(0.1 * before, rel=0.2)


def test_pairs_of_largest_magnitude_are_found_in_an_indefinite_matrix():
    eigenvalues = torch.cat([torch.tensor([-9, 8, -7, 6]), 0.01 * torch.ones(196)]).double()
    result = randomized_eigh(MatrixOperator(matrix(eigenvalues)), 4, power_iterations=2)
    torch.testing.assert_close(result.eigenvalues, eigenvalues[:4])


def test_products_are_as_many_as_announced():
    counting = CountingOperator(MatrixOperator(matrix(spectrum("poly", 200))))
    result = randomized_eigh(counting, 5, oversampling=3, power_iterations=2)
    assert counting.matvecs == result.matvecs == 4 * 8
    assert result.matmats == 4


def test_pairs_that_are_not_accurate_are_marked():
    result = randomized_eigh(MatrixOperator(matrix(spectrum("slow", 200))), 5)
    assert result.status == "maxmatvecs"
    assert not result.converged.any()
    assert "Raise power_iterations or oversampling" in result.warnings[0]


def test_a_sparse_matrix_of_scipy():
    diagonal = scipy.sparse.diags_array([0.5 ** torch.arange(100).double().numpy()], offsets=[0])
    result = randomized_eigh(from_linear_operator(diagonal.tocsr()), 3)
    expected = torch.tensor([1, 0.5, 0.25], dtype=F64)
    torch.testing.assert_close(result.eigenvalues, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 51}, "expected k from 1 to n = 50, got 51"),
        ({"oversampling": -1}, "expected oversampling and power_iterations to be at least 0"),
        ({"power_iterations": -1}, "got 10 and -1; leave them out"),
    ],
)
def test_bad_options_are_refused_before_a_product(options, message):
    counting = CountingOperator(MatrixOperator(matrix(spectrum("nn", 50))))
    with pytest.raises(OptionError, match=message):
        randomized_eigh(counting, **({"k": 2} | options))
    assert counting.matvecs == 0


def test_products_that_are_not_finite_are_named():
    with pytest.raises(NonFiniteError, match="hold NaN or infinity"):
        randomized_eigh(LambdaOperator(50, lambda v: v * torch.nan, dtype=F64), 3)


def test_a_matrix_that_is_not_symmetric_is_named():
    with pytest.raises(SymmetryError, match="noise floor"):
        randomized_eigh(MatrixOperator(torch.randn(50, 50, dtype=F64)), 3)
