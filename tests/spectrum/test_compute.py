"""Spectra of models are those of dense matrices, and what is read from them follows."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from torchlinop import KFACOperator, LambdaOperator, MatrixOperator
from torchlinop.errors import (
    NotConvergedWarning,
    OptionError,
    OrthogonalityWarning,
    PrecisionWarning,
    TorchlinopWarning,
)
from torchlinop.losses import supervised_forward
from torchlinop.spectrum import (
    LanczosConfig,
    SpectrumResult,
    compute_spectrum,
    lanczos_algorithm,
)
from torchlinop.testing import spectra
from torchlinop.testing.gallery import mlp, regression, with_spectrum
from torchlinop.testing.oracles import dense_ggn, dense_hessian

float64 = torch.float64
ROOMY = LanczosConfig(k=5, tol=1e-10)
INDEFINITE = [9.0, 4.0, -6.0, -3.0, -2.5] + [0.5] * 30 + [-0.25] * 25


def spectrum_of(eigenvalues, config=ROOMY):
    A, _ = with_spectrum(torch.as_tensor(eigenvalues, dtype=float64))
    return lanczos_algorithm(MatrixOperator(A), config)


def by_size(values, k):
    """The k values of largest size, descending."""
    values = torch.as_tensor(values, dtype=float64)
    return values[values.abs().argsort(descending=True)[:k]].sort(descending=True).values


@pytest.mark.parametrize("problem", [mlp, regression])
def test_spectra_are_those_of_the_dense_matrices(problem):
    p = problem()
    matrices = {
        "hessian": dense_hessian(p.full_loss, p.parameters),
        "ggn": dense_ggn(p.loss_of_outputs, p.outputs, p.parameters),
    }
    for kind, matrix in matrices.items():
        dense = torch.linalg.eigvalsh(matrix)
        result = compute_spectrum(p.model, p.full_batch, kind, ROOMY)
        torch.testing.assert_close(result.eigenvalues, by_size(dense, 5), rtol=1e-12, atol=1e-13)
        assert result.converged
        assert result.operator_calls >= result.iterations


def test_a_ggn_of_a_loss_that_is_not_convex_is_called_indefinite():
    p = mlp()

    def concave(outputs, batch):
        return -outputs.square().sum(1).mean()

    with pytest.warns(TorchlinopWarning, match="the loss is not convex in the outputs"):
        result = compute_spectrum(p.model, p.full_batch, "ggn", ROOMY, loss_of_output_fn=concave)
    assert not result.is_psd
    assert result.negative_mass > 0.99


def test_the_empirical_mode_of_a_ggn_is_the_empirical_fisher_matrix():
    p = mlp()
    result = compute_spectrum(p.model, p.full_batch, "ggn", ROOMY, ggn_mode="empirical")
    fisher = compute_spectrum(p.model, p.full_batch, "empirical_fisher", ROOMY)
    assert result.operator == "EmpiricalFisherOperator"
    torch.testing.assert_close(result.eigenvalues, fisher.eigenvalues, rtol=0, atol=0)


def test_given_factors_are_taken_as_they_are():
    p = mlp()
    K = KFACOperator(p.model, [p.full_batch], supervised_forward, nn.CrossEntropyLoss())
    dense = torch.linalg.eigvalsh(K.to_dense())
    for factors in (K, None):
        result = compute_spectrum(p.model, p.full_batch, "kfac", ROOMY, kfac_factors=factors)
        torch.testing.assert_close(result.eigenvalues, by_size(dense, 5), rtol=1e-12, atol=1e-13)


def test_another_dtype_leaves_the_model_as_it_is():
    p, wide = mlp(torch.float32), mlp()
    wide.model.load_state_dict(p.model.state_dict())
    before = parameters_to_vector(p.model.parameters()).clone()
    config = LanczosConfig(k=3, tol=1e-10, dtype_compute=float64)
    batch = (p.full_batch[0], p.full_batch[1])
    result = compute_spectrum(p.model, batch, "ggn", config)
    expected = compute_spectrum(wide.model, (batch[0].double(), batch[1]), "ggn", config)
    assert result.dtype == float64
    torch.testing.assert_close(result.eigenvalues, expected.eigenvalues, rtol=1e-12, atol=0)
    assert torch.equal(before, parameters_to_vector(p.model.parameters()))


def test_coarse_parameters_are_warned_of():
    p = mlp(torch.bfloat16)
    with pytest.warns(PrecisionWarning, match="product noise"):
        result = compute_spectrum(p.model, p.full_batch, "ggn", LanczosConfig(k=1, tol=0.1))
    assert "pass dtype_compute=torch.float32" in result.warnings[0]


def test_the_selective_mode_is_local_and_warns_of_copies():
    config = LanczosConfig(k=3, reorth_mode="selective", max_iters=30)
    with pytest.warns(OrthogonalityWarning, match="in copies"):
        result = spectrum_of(INDEFINITE, config)
    assert result.reorth_mode == "local"
    torch.testing.assert_close(result.eigenvalues, by_size(INDEFINITE, 3), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["reorth_period", "reorth_window", "gc_every"])
def test_options_without_effect_say_so(name):
    config = LanczosConfig(k=2, **{name: 5})
    with pytest.warns(TorchlinopWarning, match=f"{name}=5 has no effect"):
        result = spectrum_of(INDEFINITE, config)
    assert "has no effect" in result.warnings[0]


def test_what_has_not_converged_is_not_called_converged():
    p = mlp()
    config = LanczosConfig(k=10, max_iters=10, reorth_mode="partial")
    with pytest.warns(NotConvergedWarning, match="pairs reached"):
        result = compute_spectrum(p.model, p.full_batch, "ggn", config)
    assert not result.converged


def test_results_are_read_by_name_and_from_files(tmp_path):
    result = spectrum_of(INDEFINITE)
    result.save(tmp_path / "spectrum.safetensors")
    again = SpectrumResult.load(tmp_path / "spectrum.safetensors")
    assert str(again.to_dict()) == str(result.to_dict())
    assert again["most_negative_eigenvalue"] == result.most_negative_eigenvalue
    assert json.loads(json.dumps(again.to_dict()))["eigenvalues"] == result.eigenvalues.tolist()
    assert result.scalars()["eigenvalues/1"] == pytest.approx(9)
    assert "save" not in result
    with pytest.raises(KeyError):
        result["save"]


def test_a_script_of_the_field_runs_as_it_is_written(capsys):
    p = mlp()
    model, batch = p.model, p.full_batch

    def loss_fn():
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    config = LanczosConfig(k=5, max_iters=60, reorth_mode="full", dtype_compute=float64)
    results = compute_spectrum(
        model=model,
        batch=batch,
        operator_type="hessian",
        config=config,
        loss_fn=loss_fn,
        verbose=True,
    )
    if results["has_negative_eigenvalues"]:
        print(f"Negative fraction: {results['negative_fraction']:.2%}")
        print(f"Most negative: {results['most_negative_eigenvalue']:.4e}")
    if results["ritz_residuals"]:
        print(f"Ritz residuals: {results['ritz_residuals']}")
    for warning in results["warnings"]:
        print(f"  - {warning}")
    dense = torch.linalg.eigvalsh(dense_hessian(p.full_loss, p.parameters))
    assert f"Most negative: {dense[0]:.3e}"[:-5] in capsys.readouterr().out
    assert results["eigenvalues"] == pytest.approx(by_size(dense, 5).tolist(), rel=1e-10)


def test_a_loss_without_arguments_cannot_be_evaluated_in_another_dtype():
    p = mlp()
    config = LanczosConfig(k=2, dtype_compute=torch.float32)
    with pytest.raises(OptionError, match="which evaluates the original"):
        compute_spectrum(p.model, p.full_batch, "hessian", config, lambda: p.full_loss)


def test_any_operator_has_a_spectrum():
    A, _ = with_spectrum(torch.as_tensor(INDEFINITE, dtype=float64))
    result = lanczos_algorithm(MatrixOperator(A), ROOMY)
    torch.testing.assert_close(result.eigenvalues, by_size(INDEFINITE, 5), rtol=1e-12, atol=0)
    assert (result.operator, result.is_psd) == ("MatrixOperator", False)


def interrupted_after(products, eigenvalues):
    """The matrix, whose user loses patience in the product after so many."""
    A, _ = with_spectrum(torch.as_tensor(eigenvalues, dtype=float64))
    calls = iter(range(1000))

    def product(v):
        if next(calls) == products:
            raise KeyboardInterrupt
        return A @ v

    return LambdaOperator(len(A), product, dtype=float64)


def test_an_interrupted_run_returns_what_there_is_and_spends_no_more():
    A = interrupted_after(5, [9.0, 8, 7, 6, 5] + [0.01] * 95)
    with pytest.warns(NotConvergedWarning, match="pairs reached"):
        result = lanczos_algorithm(A, LanczosConfig(k=4))
    assert result.operator_calls <= 6
    assert 5 < result.max_eigenvalue < 9 + 1e-12
    assert math.isnan(result.min_eigenvalue)
    assert math.isnan(result.negative_fraction)


@pytest.mark.filterwarnings("ignore::torchlinop.errors.TorchlinopWarning")
@pytest.mark.parametrize("phase", ["the other end", "masses by quadrature", "masses exactly"])
def test_what_is_cut_short_after_the_pairs_is_unknown_and_not_wrong(phase):
    probes = 4 if phase == "masses exactly" else 1
    config = LanczosConfig(k=3, num_probes=probes, num_steps=40)
    eigenvalues = spectra.neural(100)
    whole = lanczos_algorithm(interrupted_after(-1, eigenvalues), config)
    after = whole.iterations + 3 if phase == "the other end" else whole.operator_calls - 20
    cut = lanczos_algorithm(interrupted_after(after, eigenvalues), config)
    assert cut.converged
    assert cut.operator_calls <= whole.operator_calls
    assert math.isnan(cut.min_eigenvalue) == (phase == "the other end")
    assert math.isnan(cut.negative_fraction)
    assert math.isnan(cut.negative_mass)
    assert "interrupted: numbers that are NaN were not computed" in cut.warnings
