"""Power iteration finds λ of A, not λ − β; deflation forgets no pair at any scale."""

import pytest
import scipy.sparse
import torch
from eigen_spectra import F64, assert_honest, matrix, spectrum

from torchlinop import CountingOperator, LambdaOperator, MatrixOperator, from_linear_operator
from torchlinop.algorithms.power_iteration import deflated_power_iteration, power_iteration_one
from torchlinop.errors import (
    NonFiniteError,
    NotConvergedError,
    NotConvergedWarning,
    OptionError,
    SymmetryError,
    TorchlinopWarning,
    VectorError,
)


def largest(eigenvalues, k):
    return eigenvalues[eigenvalues.abs().argsort(descending=True, stable=True)][:k]


@pytest.mark.parametrize("power", [-100, -60, 60, 100])
@pytest.mark.parametrize("momentum", [0.0, 2.0])
def test_in_float32_too_pairs_scale_exactly_with_powers_of_two(power, momentum):
    A = matrix(spectrum("nn", 200), torch.float32)
    once = deflated_power_iteration(MatrixOperator(A), 3, momentum=momentum)
    scaled = deflated_power_iteration(
        MatrixOperator(A * 2.0**power), 3, momentum=momentum * 4.0**power
    )
    assert scaled.matvecs == once.matvecs
    assert scaled.converged.all()
    assert torch.equal(scaled.eigenvectors, once.eigenvectors)
    for name in ("eigenvalues", "residual_norms", "error_bounds", "history_eigenvalues"):
        expected = getattr(once, name).double() * 2.0**power
        torch.testing.assert_close(
            getattr(scaled, name).double(), expected, rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("scale", [1, 1e-12, 1e12])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize(
    "name", ["poly", "nn", "zero", "identity", "rank 1", "rank 5", "1 and 50", "4-fold"]
)
def test_pairs_are_found_one_after_the_other_at_any_scale(name, dtype, scale):
    eigenvalues = scale * spectrum(name, 200)
    A = matrix(eigenvalues, dtype)
    result = deflated_power_iteration(MatrixOperator(A), 4)
    assert result.converged.all()
    assert_honest(result, A, largest(eigenvalues, 4))


@pytest.mark.parametrize("name", ["slow", "cluster"])
def test_slow_and_clustered_spectra_converge_or_say_so(name):
    eigenvalues = spectrum(name, 200)
    A = matrix(eigenvalues)
    with pytest.warns(NotConvergedWarning, match="pairs reached tol=1e-06"):
        result = deflated_power_iteration(MatrixOperator(A), 8, 60)
    assert 1 <= result.converged.sum() < 8
    assert_honest(result, A, eigenvalues[:8])


@pytest.mark.parametrize("momentum", [0.5, 2.0, 20.0])
def test_defect_2_momentum_returns_an_eigenvalue_of_the_matrix(momentum):
    eigenvalues = spectrum("nn", 200)  # 10, 9.1, ...
    A = matrix(eigenvalues)
    result = power_iteration_one(MatrixOperator(A), momentum=momentum)
    assert result.status == "converged"
    assert float(result.eigenvalues) == pytest.approx(10, rel=1e-10)
    assert_honest(result, A, eigenvalues[:1])


def test_momentum_saves_products_and_too_much_of_it_is_flagged():
    eigenvalues = spectrum("slow", 300) + 10  # a second eigenvalue at 0.97 of the first
    op = MatrixOperator(matrix(eigenvalues))
    best = float(eigenvalues[1]) ** 2 / 4
    plain, fast = (power_iteration_one(op, momentum=beta, tol=1e-8) for beta in (0, best))
    assert fast.matvecs < plain.matvecs / 2
    with pytest.warns(NotConvergedWarning, match="0 of 1 pairs"):
        power_iteration_one(op, momentum=2 * best, max_iter=200)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_defect_9_deflation_works_for_a_matrix_of_scale_1e_minus_7(dtype):
    eigenvalues = 1e-7 * spectrum("nn", 200)
    result = deflated_power_iteration(MatrixOperator(matrix(eigenvalues, dtype)), 3)
    torch.testing.assert_close(result.eigenvalues.double(), eigenvalues[:3], rtol=1e-6, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_defect_10_a_mirrored_pair_is_found_and_flagged(dtype, momentum):
    A = matrix(spectrum("mirrored", 200), dtype)  # 10, -10, 5, -5
    with pytest.warns(TorchlinopWarning, match="10 and -10 are both eigenvalues"):
        result = power_iteration_one(MatrixOperator(A), momentum=momentum)
    assert float(result.eigenvalues) == pytest.approx(10, rel=1e-6)
    assert result.converged.all()
    assert_honest(result, A, torch.tensor([10.0], dtype=F64))


def test_both_of_a_mirrored_pair_are_found_by_deflation():
    A = matrix(spectrum("mirrored", 200))
    with pytest.warns(TorchlinopWarning, match="are both eigenvalues"):
        result = deflated_power_iteration(MatrixOperator(A), 4)
    assert result.converged.all()
    expected = torch.tensor([-10.0, -5.0, 5.0, 10.0], dtype=F64)
    torch.testing.assert_close(result.eigenvalues.sort().values, expected)


def test_a_negative_eigenvalue_of_largest_magnitude_keeps_its_sign():
    result = power_iteration_one(MatrixOperator(-matrix(spectrum("nn", 200))))
    assert float(result.eigenvalues) == pytest.approx(-10, rel=1e-10)


def test_residuals_are_those_of_the_matrix_and_not_of_what_deflation_left():
    # The first pair is found to 1e-3 of its size only, 100 times the last.
    eigenvalues = torch.cat([100.0 / 2.0 ** torch.arange(8), torch.zeros(92)]).double()
    A = matrix(eigenvalues)
    result = deflated_power_iteration(MatrixOperator(A), 6, tol=1e-3)
    assert_honest(result, A, eigenvalues[:6])


def test_a_start_is_used():
    A = matrix(spectrum("nn", 200))
    first = deflated_power_iteration(MatrixOperator(A), 3)
    assert deflated_power_iteration(MatrixOperator(A), 3, v0=first).matvecs == 3


def test_dependent_starts_are_no_obstacle():
    eigenvalues = spectrum("rank 5", 100)
    A = matrix(eigenvalues)
    v = torch.linalg.eigh(A)[1][:, [-2]]  # the second pair comes first: all starts are in X then
    result = deflated_power_iteration(MatrixOperator(A), 2, v0=v)
    assert_honest(result, A, eigenvalues[:2])


def test_a_sparse_matrix_of_scipy():
    n = 30
    path = scipy.sparse.diags_array([1.0, 2.0, 1.0], offsets=[-1, 0, 1], shape=(n, n)).tocsr()
    result = power_iteration_one(from_linear_operator(path), max_iter=5000)
    top = 2 + 2 * torch.tensor(torch.pi / (n + 1)).double().cos()
    assert float(result.eigenvalues) == pytest.approx(float(top), rel=1e-9)


def test_the_budget_is_per_pair_and_strict_raises_with_the_result():
    counting = CountingOperator(MatrixOperator(matrix(spectrum("slow", 200))))
    with pytest.raises(NotConvergedError, match="0 of 2 pairs") as caught:
        deflated_power_iteration(counting, 2, 50, tol=1e-12, strict=True)
    assert caught.value.result.status == "maxmatvecs"
    assert counting.matvecs == 100


def test_ctrl_c_returns_the_pairs_found():
    A = matrix(spectrum("nn", 100))
    single = power_iteration_one(MatrixOperator(A))
    calls = iter(range(1000))

    def product(v):
        if next(calls) == single.matvecs + 3:
            raise KeyboardInterrupt
        return A @ v

    with pytest.warns(NotConvergedWarning, match="1 of 3 pairs reached .* To go on, restart from"):
        result = deflated_power_iteration(LambdaOperator(100, product, dtype=F64), 3)
    assert result.status == "interrupted"
    assert float(result.eigenvalues) == pytest.approx(10, rel=1e-10)


def test_ctrl_c_in_the_first_pair_returns_what_it_has_come_to():
    A = matrix(spectrum("slow", 100))
    calls = iter(range(1000))

    def product(v):
        if next(calls) == 20:
            raise KeyboardInterrupt
        return A @ v

    with pytest.warns(NotConvergedWarning, match="0 of 3 pairs reached"):
        result = deflated_power_iteration(LambdaOperator(100, product, dtype=F64), 3)
    assert (result.status, len(result), result.matvecs) == ("interrupted", 1, 21)
    assert_honest(result, A, result.eigenvalues)


def test_time_is_limited_and_the_pair_under_way_is_returned():
    A = matrix(spectrum("slow", 100))
    with pytest.warns(NotConvergedWarning, match="Raise max_seconds"):
        result = deflated_power_iteration(MatrixOperator(A), 3, max_seconds=1e-9)
    assert (result.status, len(result), result.matvecs) == ("maxseconds", 1, 1)
    assert_honest(result, A, result.eigenvalues)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": 51}, OptionError, "expected k from 1 to n = 50, got 51"),
        ({"max_iter": 0}, OptionError, "expected max_iter to be at least 1, got 0"),
        ({"momentum": -1.0}, OptionError, "expected momentum to be at least 0, got -1.0"),
        ({"tol": 2.0}, OptionError, "expected tol from 0 to 1"),
        ({"v0": torch.ones(50)}, VectorError, "in torch.float64 on cpu, got"),
    ],
)
def test_bad_options_are_refused_before_a_product(options, error, message):
    counting = CountingOperator(MatrixOperator(matrix(spectrum("nn", 50))))
    with pytest.raises(error, match=message):
        deflated_power_iteration(counting, **({"k": 2} | options))
    assert counting.matvecs == 0


def test_products_that_are_not_finite_are_named():
    with pytest.raises(NonFiniteError, match="hold NaN or infinity"):
        power_iteration_one(LambdaOperator(50, lambda v: v * torch.nan, dtype=F64))


def test_a_matrix_that_is_not_symmetric_is_named():
    with pytest.raises(SymmetryError, match="noise floor"):
        power_iteration_one(MatrixOperator(torch.randn(50, 50, dtype=F64)))
