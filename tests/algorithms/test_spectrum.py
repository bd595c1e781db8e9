"""Spectra of models are those of dense matrices, and what is read from them follows."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from torchlinop import KFACOperator
from torchlinop.algorithms.lanczos import lanczos
from torchlinop.algorithms.spectrum import (
    LanczosConfig,
    SpectrumResult,
    compute_spectrum,
    create_operator,
)
from torchlinop.errors import (
    NotConvergedWarning,
    OptionError,
    OrthogonalityWarning,
    PrecisionWarning,
    TorchlinopWarning,
)
from torchlinop.losses import hf_lm_loss_of_output, supervised_forward
from torchlinop.testing.gallery import gpt2, hugging_face_loss, mlp, regression, with_spectrum
from torchlinop.testing.oracles import dense_ggn, dense_hessian

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


def test_the_default_loss_of_a_language_model_is_its_own():
    p = gpt2(torch.float32)
    config = LanczosConfig(k=2, num_probes=0)
    usual = compute_spectrum(p.model, p.full_batch, "hessian", config)
    own = compute_spectrum(p.model, p.full_batch, "hessian", config, hugging_face_loss)
    torch.testing.assert_close(usual.eigenvalues, own.eigenvalues, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("head", "labels"),
    [
        ("MaskedLM", torch.tensor([[3, -100, 5, 1], [-100, 2, 2, -100]])),
        ("TokenClassification", torch.tensor([[0, 1, 1, 0], [-100, 0, 1, -100]])),
        ("SequenceClassification", torch.tensor([0, 1])),
    ],
)
def test_the_default_loss_of_a_head_is_its_own(head, labels):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=9, intermediate_size=8, **sizes)
    model = getattr(transformers, f"BertFor{head}")(config).eval()
    batch = {"input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), "labels": labels}
    own = model(**batch).loss.detach()
    op = create_operator("hessian", model, batch)
    torch.testing.assert_close(op.loss(), own, rtol=1e-5, atol=0)


def test_a_given_loss_of_outputs_takes_the_place_of_the_default():
    p = gpt2()
    config = LanczosConfig(k=2, num_probes=0)
    usual = compute_spectrum(p.model, p.full_batch, config=config)
    given = compute_spectrum(
        p.model,
        p.full_batch,
        config=config,
        forward_fn=p.forward_fn,
        loss_of_output_fn=hf_lm_loss_of_output(),
    )
    torch.testing.assert_close(usual.eigenvalues, given.eigenvalues, rtol=1e-12, atol=0)


def test_numbers_of_a_positive_semidefinite_matrix_follow_from_its_eigenvalues():
    result = ggn_spectrum_of([8.0, 4.0, 2.0, 1.0] + [0.25] * 56, LanczosConfig(k=4, tol=1e-10))
    assert result.is_psd
    assert result.max_eigenvalue == pytest.approx(8, rel=1e-12)
    assert result.min_eigenvalue == pytest.approx(1, rel=1e-12)
    assert result.spectral_gap == pytest.approx(4, rel=1e-12)
    assert result.ritz_condition_number == pytest.approx(8, rel=1e-12)
    assert result.ritz_effective_rank == pytest.approx(15**2 / 85, rel=1e-12)
    assert math.isnan(result.negative_mass)


INDEFINITE = [9.0, 4.0, -6.0, -3.0, -2.5] + [0.5] * 30 + [-0.25] * 25


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


def test_created_operators_serve_every_solver():
    p = mlp()
    op = create_operator("ggn", p.model, p.full_batch)
    result = compute_spectrum(p.model, p.full_batch, "ggn", ROOMY)
    values, _ = lanczos(op, 5, tol=1e-10)
    torch.testing.assert_close(result.eigenvalues, values, rtol=1e-12, atol=0)


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
    with pytest.warns(OrthogonalityWarning, match="came in copies"):
        result = spectrum_of(INDEFINITE, config)
    assert result.reorth_mode == "local"
    torch.testing.assert_close(result.eigenvalues, by_size(INDEFINITE, 3), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["reorth_period", "reorth_window", "gc_every"])
def test_options_without_effect_say_so(name):
    config = LanczosConfig(k=2, **{name: 5})
    with pytest.warns(TorchlinopWarning, match=f"{name}=5 has no effect"):
        result = ggn_spectrum_of([3.0, 2.0] + [0.1] * 30, config)
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
    assert again["most_negative_eigenvalue"] == result.to_dict()["most_negative_eigenvalue"]
    assert torch.equal(again["eigenvalues"], result.eigenvalues)
    assert result.scalars()["eigenvalues/1"] == pytest.approx(9)
    with pytest.raises(KeyError):
        result["save"]


def test_a_repr_says_what_kind_of_matrix_it_was():
    assert "HessianOperator | indefinite | n = 60 | converged" in repr(spectrum_of(INDEFINITE))
    shown = repr(ggn_spectrum_of([4.0, 2.0] + [0.5] * 30, LanczosConfig(k=2)))
    assert "positive semidefinite" in shown
    assert "condition number 2, effective rank 1.8" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reorth_mode": "sliding"}, "unknown reorth_mode 'sliding'; choose one of auto, full"),
        ({"regularization_mode": "on"}, "unknown regularization_mode 'on'; choose one of off"),
        ({"regularization": -1.0}, "expected regularization from 0 on, got -1.0"),
        ({"dtype_tridiag": torch.float32}, "expected dtype_tridiag to be torch.float64"),
        ({"num_steps": 0}, "expected num_probes from 0 and num_steps from 1 on, got 4 and 0"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        LanczosConfig(**options)


def of_its_own_model():
    return torch.zeros(())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("fisher", {}, "unknown operator_type 'fisher'; choose one of hessian, ggn"),
        ("ggn", {"ggn_mode": "exact"}, "unknown ggn_mode 'exact'; choose one of true"),
        ("ggn", {"loss_fn": hugging_face_loss}, "the loss of 'ggn' as a function of outputs"),
        ("hessian", {"loss_fn": of_its_own_model}, r"expected loss_fn\(model, batch\)"),
        (
            "hessian",
            {"loss_fn": hugging_face_loss, "forward_fn": supervised_forward},
            "got some of both; leave out loss_fn",
        ),
        ("kfac", {"kfac_factors": {}}, "expected kfac_factors to be a KroneckerOperator"),
    ],
)
def test_operators_that_make_no_sense_are_refused(kind, options, message):
    p = mlp()
    with pytest.raises(OptionError, match=message):
        create_operator(kind, p.model, p.full_batch, **options)
