"""Norms, condition numbers and the ends of spectra, against dense ones and published bounds."""

import math

import pytest
import torch

from torchlinop import CountingOperator, HessianOperator, LambdaOperator, MatrixOperator
from torchlinop.algorithms.diagonal import diagonal
from torchlinop.algorithms.extremal import (
    ExtremalEigenvalues,
    condition_number,
    extremal_eigenvalues,
)
from torchlinop.algorithms.norms import norm
from torchlinop.algorithms.trace import trace
from torchlinop.errors import DefinitenessError, NonFiniteError, OptionError
from torchlinop.testing import gallery, spectra
from torchlinop.testing.gallery import with_spectrum
from torchlinop.testing.oracles import dense_hessian

SPECTRA = [spectra.flat, spectra.polynomial, spectra.exponential, spectra.neural, spectra.step]


def operator(spectrum, n=300, dtype=torch.float64):
    return MatrixOperator(with_spectrum(spectrum(n))[0].to(dtype))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_matvecs", [1, 5, 12, 20, 40])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_spectrum_is_between_estimates_and_bounds(spectrum, num_matvecs, seed):
    ends = extremal_eigenvalues(operator(spectrum), num_matvecs, seed=seed)
    low, high = float(spectrum(300).min()), float(spectrum(300).max())
    rounding = 1e-13 * max(abs(low), abs(high))
    assert ends.smallest_bound <= low <= ends.smallest + rounding
    assert ends.largest - rounding <= high <= ends.largest_bound


@pytest.mark.parametrize("gap", [0.03, 0.1, 0.3])
def test_bounds_hold_where_a_polynomial_hides_the_largest_eigenvalue(gap):
    """The others are at zeros of the Chebyshev polynomial that is small on all of their range."""
    steps, n = 12, 60
    zeros = torch.cos((torch.arange(steps) + 0.5) * torch.pi / steps).double()
    eigenvalues = ((1 - gap) * (1 + zeros) / 2).repeat(n // steps)
    eigenvalues[0] = 1.0
    op = LambdaOperator(n, lambda v: eigenvalues * v, dtype=torch.float64)
    bounds = [extremal_eigenvalues(op, steps, seed=s).largest_bound for s in range(60)]
    assert min(bounds) >= 1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_outliers_are_found_in_forty_steps(dtype, tolerance):
    smallest, largest = extremal_eigenvalues(operator(spectra.neural, dtype=dtype), 40)
    assert smallest == pytest.approx(-1.5, rel=tolerance * 1e3)
    assert largest == pytest.approx(10, rel=tolerance)


@pytest.mark.parametrize("eigenvalues", [[2.0] * 50, [0.0] * 50, [0.0] * 49 + [3.0]])
def test_ends_are_exact_if_the_krylov_space_is_small(eigenvalues):
    op = MatrixOperator(with_spectrum(torch.tensor(eigenvalues).double())[0])
    ends = extremal_eigenvalues(op, 10)
    assert ends.smallest == pytest.approx(min(eigenvalues), abs=1e-13)
    assert ends.largest == pytest.approx(max(eigenvalues), abs=1e-13)
    assert ends.largest_bound - ends.largest < 1e-12


def test_no_more_products_are_taken_than_granted_or_useful():
    op = CountingOperator(operator(spectra.flat, n=40))
    assert extremal_eigenvalues(op, 12).matvecs == op.matvecs == 12
    assert extremal_eigenvalues(op, 100).matvecs == 40


@pytest.mark.parametrize("n", [1, 2])
def test_the_smallest_matrices_have_ends(n):
    ends = extremal_eigenvalues(MatrixOperator(torch.diag(torch.arange(1.0, n + 1)).double()))
    assert tuple(ends) == pytest.approx((1, n))


def test_ends_of_a_hermitian_matrix_are_found():
    U = torch.linalg.qr(torch.randn(60, 60, dtype=torch.complex128)).Q
    op = MatrixOperator((U * spectra.neural(60).to(U)) @ U.mH)
    assert tuple(extremal_eigenvalues(op, 60)) == pytest.approx((-1.5, 10))


@pytest.mark.parametrize("damping", [1e-1, 1e-3])
def test_the_condition_number_is_between_its_bounds(damping):
    eigenvalues = spectra.exponential(200) + damping
    result = condition_number(MatrixOperator(with_spectrum(eigenvalues)[0]), 100)
    truth = float(eigenvalues.max() / eigenvalues.min())
    assert result.estimate * (1 - 1e-10) <= truth <= result.upper
    assert float(result) == pytest.approx(truth, rel=1e-3)


def test_few_steps_bound_the_condition_number_from_below_only():
    result = condition_number(operator(spectra.polynomial, 300), 5)
    assert result.estimate < 300**2
    assert math.isinf(result.upper)


def test_a_singular_matrix_has_an_infinite_condition_number():
    eigenvalues = torch.tensor([0.0] * 40 + [1.0] * 60).double()
    result = condition_number(MatrixOperator(with_spectrum(eigenvalues)[0]))
    assert math.isinf(result.estimate)
    assert repr(result).startswith("ConditionNumber  inf (at most inf) = 1 / ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_conditions_up_to_the_rounding_of_products_are_finite_in_coarse_dtypes(dtype, seed):
    matrix = torch.diag(torch.linspace(1 / 128, 1, 100).bfloat16()).to(dtype)
    assert float(condition_number(MatrixOperator(matrix), seed=seed)) == pytest.approx(128, rel=0.1)


def test_an_indefinite_matrix_has_no_condition_number_by_products():
    with pytest.raises(DefinitenessError, match=r"expected none below zero. Shift the operator"):
        condition_number(operator(spectra.neural))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ord", [2, "fro", "nuc"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_norms_are_within_their_bounds(spectrum, ord, seed):
    result = norm(operator(spectrum), ord, num_matvecs=100, seed=seed)
    x = spectrum(300)
    truth = {2: x.abs().max(), "fro": x.norm(), "nuc": x.abs().sum()}[ord]
    slack = 3 * result.stderr  # of an interval of 95 %
    assert result.lower - slack - 1e-9 <= float(truth) <= result.upper + slack + 1e-9


@pytest.mark.parametrize("spectrum", [spectra.neural, spectra.flat, spectra.exponential])
def test_the_bounds_of_the_nuclear_norm_cover_the_error_of_few_steps(spectrum):
    op, truth = operator(spectrum), float(spectrum(300).abs().sum())
    results = [norm(op, "nuc", num_matvecs=60, seed=seed) for seed in range(20)]
    assert sum(r.lower <= truth <= r.upper for r in results) >= 19


def test_the_nuclear_norm_is_known_if_its_nodes_are_eigenvalues():
    op = MatrixOperator(with_spectrum(torch.tensor([-1.0, 1.0]).repeat(50).double())[0])
    result = norm(op, "nuc", num_matvecs=80)
    assert result.lower == pytest.approx(100, abs=1e-9)
    assert result.upper == pytest.approx(100, abs=1e-9)


TINY_AND_HUGE = [(torch.float32, -100), (torch.float32, 100), (torch.float64, -1000)]


@pytest.mark.parametrize(("dtype", "power"), TINY_AND_HUGE)
@pytest.mark.parametrize(
    "numbers",
    [
        lambda op: [norm(op, ord).estimate for ord in (2, "fro", "nuc")],
        lambda op: [norm(op, ord).upper for ord in (2, "fro", "nuc")],
        lambda op: list(extremal_eigenvalues(op)),
        lambda op: [trace(op, method=m).estimate for m in ("hutchinson", "xtrace", "na-hutch++")],
        lambda op: diagonal(op).estimate.tolist(),
        lambda op: diagonal(op, method="hutchinson").stderr.tolist(),
    ],
)
def test_tiny_and_huge_matrices_give_the_same_digits(numbers, dtype, power):
    A = with_spectrum(spectra.neural(100))[0].to(dtype)
    expected = numbers(MatrixOperator(A))
    scaled = A * 2.0 ** (power / 2) * 2.0 ** (power / 2)  # 2^p itself may be out of range
    assert [x / 2.0**power for x in numbers(MatrixOperator(scaled))] == expected


def test_the_frobenius_norm_has_the_error_of_deflation_not_of_probes():
    result = norm(operator(spectra.polynomial), "fro")
    assert float(result) == pytest.approx(float(spectra.polynomial(300).norm()), rel=1e-4)
    assert result.stderr < 1e-4


@pytest.mark.parametrize("ord", ["fro", "nuc"])
def test_norms_are_exact_if_as_many_products_as_rows_are_granted(ord):
    A = with_spectrum(spectra.neural(60))[0]
    op = CountingOperator(MatrixOperator(A))
    result = norm(op, ord, num_matvecs=60)
    assert float(result) == pytest.approx(float(torch.linalg.matrix_norm(A, ord)), rel=1e-12)
    assert (result.stderr, result.lower, result.upper) == (0, result.estimate, result.estimate)
    assert op.matvecs == result.matvecs == 60


@pytest.mark.parametrize(("ord", "budget"), [(2, 20), (2, 7), ("fro", 59), ("nuc", 90)])
def test_norms_take_no_more_products_than_granted(ord, budget):
    op = CountingOperator(operator(spectra.neural))
    result = norm(op, ord, num_matvecs=budget)
    assert result.matvecs == op.matvecs <= budget


def test_norms_of_a_hessian_are_those_of_the_dense_one():
    p = gallery.mlp()
    H = HessianOperator(p.model, p.batches, p.loss_fn)
    dense = dense_hessian(p.full_loss, p.parameters)
    assert float(norm(H)) == pytest.approx(float(torch.linalg.matrix_norm(dense, 2)), rel=1e-6)
    assert float(norm(H, "fro")) == pytest.approx(float(dense.norm()), rel=1e-12)


def test_the_frobenius_norm_of_a_hermitian_matrix_is_found():
    U = torch.linalg.qr(torch.randn(100, 100, dtype=torch.complex128)).Q
    op = MatrixOperator((U * spectra.neural(100).to(U)) @ U.mH)
    result = norm(op, "fro")
    assert abs(float(result) - float(spectra.neural(100).norm())) < 4 * result.stderr


@pytest.mark.parametrize("rank", [1, 5])
def test_bounds_of_the_frobenius_norm_hold_beyond_the_rank_in_float32(rank):
    A = with_spectrum(spectra.low_rank(300, rank))[0].float()
    truth = float(A.double().norm())
    results = [norm(MatrixOperator(A), "fro", num_matvecs=24, seed=seed) for seed in range(20)]
    assert all(result.lower <= truth <= result.upper for result in results)
    assert all(result.upper - result.lower < 2e-6 * truth for result in results)


@pytest.mark.parametrize("ord", [2, "fro", "nuc"])
def test_the_zero_matrix_has_norm_zero(ord):
    result = norm(MatrixOperator(torch.zeros(100, 100).double()), ord, num_matvecs=20)
    assert (result.estimate, result.stderr) == (0, 0)


def test_reports_are_one_line():
    op = operator(spectra.neural)
    assert repr(norm(op)).startswith("NormResult  2-norm 10 | in [10, 10.")
    assert " +- " in repr(norm(op, "fro"))
    assert repr(extremal_eigenvalues(op)).startswith("ExtremalEigenvalues  smallest -1.")


def test_results_come_back_from_their_file(tmp_path):
    pytest.importorskip("safetensors")
    ends = extremal_eigenvalues(operator(spectra.neural))
    ends.save(tmp_path / "ends")
    assert vars(ExtremalEigenvalues.load(tmp_path / "ends")) == vars(ends)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: norm(op, 1), 'unknown ord 1; choose 2, "fro" or "nuc"'),
        (lambda op: norm(op, num_matvecs=0), "expected num_matvecs to be at least 1, got 0"),
        (lambda op: norm(op, seed=-1), "expected seed to be an integer from 0 on, got -1"),
        (lambda op: extremal_eigenvalues(op, 0), "expected num_matvecs to be at least 1, got 0"),
        (lambda op: condition_number(op, 0), "expected num_matvecs to be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused_before_any_product(call, message):
    op = CountingOperator(operator(spectra.flat, n=20))
    with pytest.raises(OptionError, match=message):
        call(op)
    assert op.matvecs == 0


@pytest.mark.parametrize("ord", [2, "fro", "nuc"])
@pytest.mark.parametrize("num_matvecs", [10, 60])
def test_products_that_are_not_finite_are_refused(ord, num_matvecs):
    with pytest.raises(NonFiniteError):
        norm(LambdaOperator(60, lambda v: v / 0.0), ord, num_matvecs=num_matvecs)
