"""Gaps, conditions and masses are those of the whole spectrum, where they claim to be."""

import math

import pytest
import torch
from torch import nn

from torchlinop.spectrum import LanczosConfig, compute_spectrum
from torchlinop.testing.gallery import with_spectrum

float64 = torch.float64
ROOMY = LanczosConfig(k=5, tol=1e-10)


class Point(nn.Module):
    """A point θ, at which a quadratic form is a loss."""

    def __init__(self, n, dtype=float64):
        super().__init__()
        self.theta = nn.Parameter(torch.ones(n, dtype=dtype))


def spectrum_of(eigenvalues, config=ROOMY):
    """The result for the Hessian of ½ θᵀ A θ, which is A."""
    A, _ = with_spectrum(torch.as_tensor(eigenvalues, dtype=float64))
    model, batch = Point(len(A)), (torch.zeros(1, 1), torch.zeros(1))

    def loss(model, batch):
        return model.theta @ A @ model.theta / 2

    return compute_spectrum(model, batch, "hessian", config, loss)


def ggn_spectrum_of(eigenvalues, config=ROOMY, dtype=float64):
    """The result for least squares with (2 / N) XᵀX of this spectrum."""
    values = torch.as_tensor(eigenvalues, dtype=float64)
    n = len(values)
    _, Q = with_spectrum(values)
    X = ((n * values / 2).sqrt()[:, None] * Q.mT).to(dtype)
    model = nn.Linear(n, 1, bias=False, dtype=dtype)
    return compute_spectrum(model, (X, torch.zeros(n, 1, dtype=dtype)), "ggn", config)


INDEFINITE = [9.0, 4.0, -6.0, -3.0, -2.5] + [0.5] * 30 + [-0.25] * 25


def test_numbers_of_a_positive_semidefinite_matrix_follow_from_its_eigenvalues():
    result = ggn_spectrum_of([8.0, 4.0, 2.0, 1.0] + [0.25] * 56, LanczosConfig(k=4, tol=1e-10))
    assert result.is_psd
    assert result.max_eigenvalue == pytest.approx(8, rel=1e-12)
    assert result.min_eigenvalue == pytest.approx(1, rel=1e-12)
    assert result.spectral_gap == pytest.approx(4, rel=1e-12)
    assert result.ritz_condition_number == pytest.approx(8, rel=1e-12)
    assert result.ritz_effective_rank == pytest.approx(15**2 / 85, rel=1e-12)
    assert math.isnan(result.negative_mass)


def test_numbers_of_an_indefinite_matrix_are_those_of_all_its_eigenvalues():
    result = spectrum_of(INDEFINITE)
    assert not result.is_psd
    assert result.has_negative_eigenvalues
    assert result.n_negative == 3
    assert result.range_ratio == pytest.approx(1.5, rel=1e-12)
    assert result.sharpness_score == pytest.approx(9, rel=1e-12)
    assert result.most_negative_eigenvalue == pytest.approx(-6, rel=1e-12)
    assert result.negative_fraction == pytest.approx(28 / 60, rel=1e-12)
    assert result.negative_mass == pytest.approx((11.5 + 6.25) / (24.5 + 15 + 6.25), rel=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
def test_an_end_that_is_not_among_the_largest_is_looked_for(sign):
    values = [sign * x for x in (9.0, 8, 7, 6, 5, -2)] + [0.01 * x for x in range(-20, 20)]
    result = spectrum_of(values)
    other = result.min_eigenvalue if sign > 0 else result.max_eigenvalue
    # The square of a residual of 1e-4 times 11, over a gap of 1.8.
    assert other == pytest.approx(-2 * sign, rel=1e-6)
    assert result.range_ratio == pytest.approx(4.5**sign, rel=1e-6)
    assert result.sharpness_score == pytest.approx(9, rel=1e-12)


def test_negative_masses_by_quadrature_agree_with_the_spectrum():
    config = LanczosConfig(k=3, num_probes=10, num_steps=20)
    result = spectrum_of([20.0, 15.0, -18.0] + [1.0] * 250 + [-0.5] * 147, config)
    assert result.operator_calls - result.iterations == 200
    assert result.negative_fraction_low <= 148 / 400 <= result.negative_fraction_high
    mass = (18 + 73.5) / (53 + 250 + 73.5)
    assert abs(result.negative_mass - mass) < 3 * result.negative_mass_stderr < 0.2


def test_masses_can_be_left_out():
    result = spectrum_of(INDEFINITE, LanczosConfig(k=5, num_probes=0))
    assert math.isnan(result.negative_fraction)
    assert result.operator_calls == result.iterations


def test_a_hessian_without_negative_eigenvalues_has_none():
    result = spectrum_of([5.0, 3, 2, 1] + [0.0] * 40)
    assert not result.has_negative_eigenvalues
    assert (result.n_negative, result.negative_fraction, result.negative_mass) == (0, 0, 0)
    assert result.most_negative_eigenvalue == 0


@pytest.mark.parametrize("dtype", [torch.float32, float64])
def test_a_matrix_of_smaller_rank_than_k_is_positive_semidefinite(dtype):
    config = LanczosConfig(k=6, regularization_mode="off")
    result = ggn_spectrum_of([5.0, 2.0, 1.0] + [0.0] * 37, config, dtype)
    assert result.is_psd
    assert result.ritz_condition_number == math.inf


@pytest.mark.parametrize(
    ("mode", "rest", "added"),
    [
        ("off", 0.0, 0.0),
        ("fixed", 0.0, 0.01),
        ("relative", 0.0, 0.05),
        ("auto", 0.0, 0.05),
        ("auto", 0.1, 0.0),
    ],
)
def test_regularization_shifts_the_eigenvalues(mode, rest, added):
    config = LanczosConfig(k=4, tol=1e-10, regularization_mode=mode, regularization=0.01)
    result = ggn_spectrum_of([5.0, 2.0, 1.0] + [rest] * 37, config)
    expected = torch.tensor([5.0, 2.0, 1.0], dtype=float64) + added
    assert result.regularization_applied == pytest.approx(added, rel=1e-12)
    torch.testing.assert_close(result.eigenvalues[:3], expected, rtol=1e-12, atol=0)
    assert any("was added" in w for w in result.warnings) == bool(added)


def test_indefinite_matrices_are_not_regularized():
    result = spectrum_of(INDEFINITE, LanczosConfig(k=5, regularization_mode="fixed"))
    assert result.regularization_applied == 0
    assert "leaves indefinite matrices as they are" in result.warnings[-1]


def test_a_repr_says_what_kind_of_matrix_it_was():
    assert "HessianOperator | indefinite | n = 60 | converged" in repr(spectrum_of(INDEFINITE))
    shown = repr(ggn_spectrum_of([4.0, 2.0] + [0.5] * 30, LanczosConfig(k=2)))
    assert "positive semidefinite" in shown
    assert "condition number 2, effective rank 1.8" in shown


def test_results_have_the_names_of_the_field():
    assert set(FIELDS.split()) <= set(spectrum_of(INDEFINITE).keys())


FIELDS = """eigenvalues operator is_psd iterations converged n_params seed reorth_mode
    regularization_applied warnings ritz_residuals operator_calls max_eigenvalue min_eigenvalue
    spectral_gap ritz_condition_number ritz_effective_rank has_negative_eigenvalues n_negative
    range_ratio sharpness_score negative_fraction negative_mass most_negative_eigenvalue"""
