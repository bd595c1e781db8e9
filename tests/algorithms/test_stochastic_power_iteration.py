"""The top eigenpair of a mean of matrices, with a standard error and a noise floor that hold."""

import pytest
import torch
from eigen_spectra import F64, matrix, spectrum

from torchlinop import CountingOperator, LambdaOperator, MatrixOperator
from torchlinop.algorithms.stochastic_power_iteration import (
    StochasticEigenpair,
    stochastic_power_iteration,
)
from torchlinop.errors import NonFiniteError, OptionError, VectorError

A = matrix(spectrum("poly", 100))


def noisy(sigma, run=0):
    """A, and a symmetric matrix of independent entries of standard deviation sigma, by step."""

    def operator(step):
        generator = torch.Generator().manual_seed(1000 * run + step)
        B = torch.randn(100, 100, generator=generator, dtype=F64).triu()
        return MatrixOperator(A + sigma * (B + B.triu(1).T))

    return operator


@pytest.mark.parametrize("momentum", [0.0, 0.01])
@pytest.mark.parametrize("sign", [1, -1])
def test_without_noise_it_is_power_iteration(sign, momentum):
    result = stochastic_power_iteration([MatrixOperator(sign * A)], 100, momentum=momentum)
    assert result.eigenvalue == pytest.approx(sign, rel=1e-12)
    assert result.stderr <= 1e-15
    assert result.residual_norm <= 1e-12


def test_the_standard_error_is_that_of_the_quotient_of_the_vector():
    z = []
    for run in range(100):
        result = stochastic_power_iteration(noisy(0.01, run), 80, seed=run)
        v = result.eigenvector
        z.append((result.eigenvalue - float(v @ A @ v)) / result.stderr)
    # A Student t of 19 degrees of freedom: its variance is 19/17, and 100 draws spread by 0.15.
    z = torch.tensor(z)
    assert abs(float(z.mean())) < 0.35
    assert float(z.square().mean()) == pytest.approx(19 / 17, abs=0.5)


def test_the_noise_is_that_of_a_product():
    result = stochastic_power_iteration(noisy(0.01), 400)
    assert result.noise == pytest.approx(0.01 * 100**0.5, rel=0.05)
    assert result.noise_floor == pytest.approx(result.noise / 10)


def test_the_residual_is_that_of_the_mean_with_the_noise_taken_off():
    # Where the iteration is stopped early, a residual stands well above the noise floor.
    operators = [MatrixOperator(matrix(spectrum("slow", 100)) * (1 + 1e-5 * s)) for s in (-1, 1)]
    result = stochastic_power_iteration(operators, 20)
    v, mean = result.eigenvector, matrix(spectrum("slow", 100))
    true = float((mean @ v - v * (v @ mean @ v)).norm())
    assert result.residual_norm == pytest.approx(true, rel=0.02)


def test_averaging_lessens_the_noise_of_the_vector():
    errors = []
    for tail in (0.05, 0.4):
        found = [stochastic_power_iteration(noisy(0.01, r), 200, tail=tail) for r in range(5)]
        errors.append(sum(1 - float((A @ r.eigenvector).norm()) for r in found))
    assert errors[1] < errors[0] / 2


def test_one_product_is_spent_a_step():
    operators = [CountingOperator(MatrixOperator(A)) for _ in range(3)]
    result = stochastic_power_iteration(operators, 40)
    counts = [op.matvecs for op in operators]
    assert sum(counts) == result.matvecs == 40
    assert min(counts) >= 5
    assert len(result.history) == 30


def test_equal_seeds_give_equal_results():
    operators = [MatrixOperator(A * s) for s in (0.9, 1.0, 1.1)]
    one, other, third = (stochastic_power_iteration(operators, 20, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.eigenvector, other.eigenvector)
    assert not torch.equal(one.eigenvector, third.eigenvector)


def test_a_result_is_read_back(tmp_path):
    result = stochastic_power_iteration(noisy(0.01), 20)
    result.save(tmp_path / "pair")
    again = StochasticEigenpair.load(tmp_path / "pair")
    assert repr(again) == repr(result)
    assert torch.equal(again.eigenvector, result.eigenvector)
    value, vector = again
    assert (value, len(vector)) == (result.eigenvalue, 100)


def test_time_is_limited_and_two_products_judge_what_there_is():
    result = stochastic_power_iteration([MatrixOperator(A)], 100, max_seconds=1e-9)
    assert (result.status, result.steps, result.judged) == ("maxseconds", 3, 2)
    v = result.eigenvector
    assert result.eigenvalue == pytest.approx(float(v @ A @ v), rel=1e-12)
    assert "3 matvecs (maxseconds)" in repr(result)


@pytest.mark.parametrize(("product", "steps", "averaged"), [(10, 11, 1), (60, 61, 9), (80, 79, 25)])
def test_ctrl_c_returns_what_there_is_judged_by_two_products_at_least(product, steps, averaged):
    calls = iter(range(1, 1000))

    def interrupted(v):
        if next(calls) == product:
            raise KeyboardInterrupt
        return A @ v

    result = stochastic_power_iteration([LambdaOperator(100, interrupted, dtype=F64)], 100)
    assert (result.status, result.steps, result.averaged) == ("interrupted", steps, averaged)
    v = result.eigenvector
    assert result.eigenvalue == pytest.approx(float(v @ A @ v), rel=1e-12)
    assert len(result.history) == result.steps - result.judged


def test_ctrl_c_in_the_first_product_is_passed_on():
    def interrupted(v):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stochastic_power_iteration([LambdaOperator(100, interrupted, dtype=F64)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 7}, "expected steps to be at least 8, got 7"),
        ({"momentum": -1.0}, "expected momentum to be at least 0"),
        ({"tail": 0.5}, "expected tail above 0 and up to 0.4, got 0.5"),
        ({"operators": []}, "expected at least one operator, got none"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        stochastic_power_iteration(**({"operators": [MatrixOperator(A)]} | options))


def test_operators_of_different_spaces_are_refused():
    operators = [MatrixOperator(A), MatrixOperator(A[:50, :50])]
    with pytest.raises(VectorError, match="expected operators on one space"):
        stochastic_power_iteration(lambda step: operators[step % 2], 20)


def test_products_that_are_not_finite_are_named():
    with pytest.raises(NonFiniteError, match="hold NaN or infinity"):
        stochastic_power_iteration([LambdaOperator(50, lambda v: v * torch.nan, dtype=F64)], 10)
