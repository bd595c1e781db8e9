"""Operators are found by name, with the loss that fits the batch."""

import copy

import pytest
import torch
from torch import nn

from torchlinop import EmpiricalFisherOperator, GGNOperator, HessianOperator, KFACOperator
from torchlinop.algorithms.lanczos import lanczos
from torchlinop.errors import OptionError, TorchlinopError
from torchlinop.losses import hf_lm_loss_of_output, supervised_forward
from torchlinop.spectrum import LanczosConfig, compute_spectrum, create_operator
from torchlinop.testing.gallery import gpt2, hugging_face_loss, mlp
from torchlinop.testing.oracles import dense_hessian

ROOMY = LanczosConfig(k=5, tol=1e-10)


@pytest.mark.parametrize(
    ("kind", "operator"),
    [
        ("hessian", HessianOperator),
        ("ggn", GGNOperator),
        ("empirical_fisher", EmpiricalFisherOperator),
        ("kfac", KFACOperator),
    ],
)
def test_names_are_those_of_operators(kind, operator):
    p = mlp()
    assert isinstance(create_operator(kind, p.model, p.full_batch, device="cpu"), operator)


def test_a_loss_without_arguments_sees_the_parameters_of_the_model_it_knows():
    p = mlp()
    inputs, targets = p.full_batch

    def loss_fn():
        return nn.functional.cross_entropy(p.model(inputs), targets)

    op = create_operator("hessian", p.model, p.full_batch, loss_fn)
    dense = dense_hessian(p.full_loss, p.parameters)
    torch.testing.assert_close(op.to_dense(), dense, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("trained", [True, False])
def test_a_loss_without_arguments_of_another_model_is_refused(trained):
    p = mlp()
    other = copy.deepcopy(p.model).requires_grad_(trained)
    inputs, targets = p.full_batch

    def loss_fn():
        return nn.functional.cross_entropy(other(inputs), targets)

    with pytest.raises(TorchlinopError, match=r"not those of the model|do the selected parameters"):
        create_operator("hessian", p.model, p.full_batch, loss_fn)


def of_three(a, b, c):
    return torch.zeros(())


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


def test_created_operators_serve_every_solver():
    p = mlp()
    op = create_operator("ggn", p.model, p.full_batch)
    result = compute_spectrum(p.model, p.full_batch, "ggn", ROOMY)
    values, _ = lanczos(op, 5, tol=1e-10)
    torch.testing.assert_close(result.eigenvalues, values, rtol=1e-12, atol=0)


def of_its_own_model():
    return torch.zeros(())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("fisher", {}, "unknown operator_type 'fisher'; choose one of hessian, ggn"),
        ("ggn", {"ggn_mode": "exact"}, "unknown ggn_mode 'exact'; choose one of true"),
        ("ggn", {"loss_fn": hugging_face_loss}, "the loss of 'ggn' as a function of outputs"),
        ("hessian", {"loss_fn": of_three}, "which takes other arguments"),
        ("empirical_fisher", {"loss_fn": of_its_own_model}, "evaluated on parts of the batch"),
        (
            "hessian",
            {"loss_fn": of_its_own_model, "microbatch_size": 2},
            "evaluated on parts of the batch",
        ),
        ("ggn", {"device": "meta"}, "expected device to be that of the model, cpu, got meta"),
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
