"""Diagonal operators are diagonal matrices, and that of the GGN has its diagonal."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchlinop.batches import tree_map
from torchlinop.errors import (
    BatchError,
    OptionError,
    SampleMixingError,
    VectorError,
)
from torchlinop.losses import hf_lm_forward, hf_lm_loss_of_output
from torchlinop.operators.diagonal import DiagonalOperator, ggn_diagonal
from torchlinop.parameters import ParameterLayout, match_names
from torchlinop.testing import gallery
from torchlinop.testing.oracles import dense_ggn

D = torch.tensor([3.0, 0.5, 2.0, 7.0]).double()


def relative(d, reference):
    return float((d - reference).abs().max() / reference.abs().max())


def test_a_diagonal_operator_is_the_diagonal_matrix():
    operator = DiagonalOperator(D)
    assert torch.equal(operator.to_dense(), D.diag())
    torch.testing.assert_close(operator @ torch.ones(4).double(), D)


def test_the_entries_are_copied():
    entries = D.clone()
    operator = DiagonalOperator(entries)
    entries.fill_(0)
    assert torch.equal(operator.diagonal, D)


@pytest.mark.parametrize("damping", [0.0, 0.25])
def test_the_inverse_is_that_of_the_damped_matrix(damping):
    inverse = DiagonalOperator(D).inverse(damping)
    expected = torch.linalg.inv(D.diag() + damping * torch.eye(4).double())
    torch.testing.assert_close(inverse.to_dense(), expected, rtol=1e-15, atol=0)


def test_the_inverse_keeps_the_names():
    layout = ParameterLayout.of(nn.Linear(3, 1).double())
    inverse = DiagonalOperator(D, layout=layout).inverse(1.0)
    assert "inverse of DiagonalOperator + 1 I" in repr(inverse)
    assert inverse.restrict(match_names("bias")).to_dense().item() == 1 / 8


@pytest.mark.parametrize(
    "d", [D, -D, torch.tensor([1.0, -2.0, 3.0]).double(), torch.tensor([0.0, 2.0]).double()]
)
def test_trace_and_logdet_are_those_of_the_dense_matrix(d):
    operator = DiagonalOperator(d)
    torch.testing.assert_close(operator.trace(), d.diag().trace())
    torch.testing.assert_close(operator.logdet(), torch.logdet(d.diag()), equal_nan=True)


@pytest.mark.parametrize(
    ("operation", "error", "message"),
    [
        (lambda: DiagonalOperator(D.diag()), VectorError, r"entries \(n,\), got torch.float64"),
        (lambda: DiagonalOperator(D.long()), VectorError, "real floating-point entries"),
        (
            lambda: DiagonalOperator(D).inverse(-2.0),
            OptionError,
            "makes the matrix invertible in torch.float64, got -2, which leaves an eigenvalue of 0",
        ),
        (
            lambda: DiagonalOperator(torch.tensor([0.0, 2.0])).inverse(1e-40),
            OptionError,
            "invertible in torch.float32, got 1e-40, which leaves an eigenvalue of 1e-40",
        ),
        (
            lambda: DiagonalOperator(D).inverse(float("nan")),
            OptionError,
            "expected damping to be a finite real number, got nan",
        ),
        (
            lambda: DiagonalOperator(D, layout=ParameterLayout.of(nn.Linear(3, 2))),
            VectorError,
            "expected a layout of 4 entries, got one of 8; pass",
        ),
    ],
)
def test_what_is_no_invertible_diagonal_is_refused(operation, error, message):
    with pytest.raises(error, match=message):
        operation()


PROBLEMS = {
    "cross-entropy": gallery.mlp,
    "squared error": gallery.regression,
    "binary labels": gallery.binary,
    "class weights": gallery.weighted_classes,
    "ignored labels": gallery.masked_labels,
    "labelled sequences": gallery.labelled_sequences,
    "real sequences": gallery.real_sequences,
    "CNN with nn.Flatten()": gallery.cnn,
    "tied weights": gallery.tied,
    "LSTM": functools.partial(gallery.recurrent, nn.LSTM),
    "attention": gallery.attention,
    "custom function": gallery.custom_function,
    "checkpointing": functools.partial(gallery.checkpointed, use_reentrant=True),
}


@functools.cache
def problem(name, dtype=torch.float64):
    return PROBLEMS[name](dtype=dtype)


@functools.cache
def oracle(name):
    p = problem(name)
    return dense_ggn(p.loss_of_outputs, p.outputs, p.parameters).diagonal()


@pytest.mark.parametrize("batching", ["one batch", "ragged batches"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_ggn_diagonal_is_that_of_the_dense_ggn(name, batching):
    p = problem(name)
    batches = p.batches if batching == "ragged batches" else [p.full_batch]
    d = ggn_diagonal(p.model, batches, p.forward_fn, p.criterion)
    assert relative(d.diagonal, oracle(name)) < 1e-12


def test_ggn_diagonal_keeps_the_names_and_says_what_it_is():
    p = problem("cross-entropy")
    d = ggn_diagonal(p.model, p.batches, p.forward_fn, p.criterion)
    assert d.layout.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert "diagonal of the GGN | Sequential, 4 of 4 tensors | 23 samples" in repr(d)


@pytest.mark.parametrize("name", ["cross-entropy", "CNN with nn.Flatten()", "labelled sequences"])
def test_ggn_diagonal_in_float32_agrees_to_single_precision(name):
    p = PROBLEMS[name](dtype=torch.float32)
    d = ggn_diagonal(p.model, p.batches, p.forward_fn, p.criterion).diagonal.double()
    p.model.double()
    full = tree_map(lambda t: t.double() if t.is_floating_point() else t, p.full_batch)

    def loss(outputs):
        return p.criterion(outputs, *full[1:])

    reference = dense_ggn(loss, lambda: p.forward_fn(p.model, full), p.parameters).diagonal()
    assert relative(d, reference) < 1e-5


@pytest.mark.parametrize("name", ["cross-entropy", "labelled sequences", "real sequences"])
def test_ggn_diagonal_of_a_summed_loss_is_a_sum(name):
    p = problem(name)
    summed = type(p.criterion)(reduction="sum")
    d = ggn_diagonal(p.model, p.batches, p.forward_fn, summed).diagonal
    assert relative(d, oracle(name) * p.full_batch[1].numel()) < 1e-12


@pytest.mark.parametrize("name", ["cross-entropy", "real sequences"])
@pytest.mark.parametrize("batching", ["one batch", "ragged batches"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ggn_diagonal_of_a_loss_by_autograd_is_that_of_the_dense_ggn(name, batching, reduction):
    p = problem(name)
    batches = p.batches if batching == "ragged batches" else [p.full_batch]
    function = F.cross_entropy if name == "cross-entropy" else F.mse_loss

    def loss(outputs, batch):
        return function(outputs, batch[1], reduction=reduction)

    d = ggn_diagonal(p.model, batches, p.forward_fn, loss).diagonal
    terms = p.full_batch[1].numel() if reduction == "sum" else 1
    assert relative(d, terms * oracle(name)) < 1e-12


@pytest.mark.parametrize("model", [gallery.gpt2, gallery.llama])
def test_ggn_diagonal_of_language_models_is_that_of_the_dense_ggn(model):
    p = model()
    labels = p.full_batch["labels"]

    def loss(logits):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    reference = dense_ggn(loss, p.outputs, p.parameters).diagonal()
    d = ggn_diagonal(p.model, p.batches, hf_lm_forward(), hf_lm_loss_of_output())
    assert relative(d.diagonal, reference) < 1e-12


def test_a_filter_selects_entries_of_the_ggn_diagonal():
    p = problem("cross-entropy")
    d = ggn_diagonal(p.model, p.batches, p.forward_fn, p.criterion, param_filter=match_names("2.*"))
    assert relative(d.diagonal, oracle("cross-entropy")[35:]) < 1e-12


def test_microbatches_change_no_ggn_diagonal():
    p = problem("class weights")
    d = ggn_diagonal(p.model, [p.full_batch], p.forward_fn, p.criterion, microbatch_size=4)
    assert relative(d.diagonal, oracle("class weights")) < 1e-12


def test_batches_that_count_alike_are_averaged_with_their_own_means():
    p = problem("cross-entropy")
    options = {"weighting": "batch-mean"}
    d = ggn_diagonal(p.model, p.batches, p.forward_fn, p.criterion, **options).diagonal
    each = [ggn_diagonal(p.model, [b], p.forward_fn, p.criterion).diagonal for b in p.batches]
    assert relative(d, torch.stack(each).mean(0)) < 1e-12


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


def test_samples_that_depend_on_each_other_have_no_ggn_diagonal_by_samples():
    p = gallery.mlp()
    model = nn.Sequential(p.model, Centred())
    with pytest.raises(SampleMixingError, match="a sample alone has other outputs"):
        ggn_diagonal(model, p.batches, p.forward_fn, p.criterion)
    q = gallery.cnn()
    with pytest.raises(SampleMixingError, match="BatchNorm 1 uses the batch in train mode"):
        ggn_diagonal(q.model, q.batches, q.forward_fn, q.criterion, mode="train")


class Noisy(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.01, training=self.training)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), Noisy()])
def test_a_model_that_drops_has_no_ggn_diagonal_by_samples(layer):
    p = gallery.mlp()
    data = (nn.Sequential(p.model, layer).double(), p.batches, p.forward_fn, p.criterion)
    with pytest.raises(OptionError, match=r'draws random numbers.*pass mode="eval"'):
        ggn_diagonal(*data, mode="train")
    data[0].eval()
    assert relative(ggn_diagonal(*data).diagonal, oracle("cross-entropy")) < 1e-12


def test_in_train_mode_a_model_without_noise_has_the_same_ggn_diagonal():
    p = gallery.mlp()
    d = ggn_diagonal(p.model, p.batches, p.forward_fn, p.criterion, mode="train")
    assert relative(d.diagonal, oracle("cross-entropy")) < 1e-12


def contrastive(outputs, batch):
    return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))


@pytest.mark.parametrize("option", [{"weight": lambda b: len(b[1])}, {"weighting": "batch-mean"}])
def test_a_loss_that_mixes_samples_is_refused_whatever_the_weights(option):
    p = gallery.mlp()
    with pytest.raises(SampleMixingError, match="mixes samples"):
        ggn_diagonal(p.model, p.batches, p.forward_fn, contrastive, **option)


def test_a_custom_loss_of_batches_that_count_the_same_has_the_diagonal_of_the_recognised_one():
    p = gallery.mlp()
    custom, recognised = (
        ggn_diagonal(p.model, p.batches, p.forward_fn, loss, weighting="batch-mean")
        for loss in (lambda outputs, batch: F.cross_entropy(outputs, batch[1]), p.criterion)
    )
    torch.testing.assert_close(custom.diagonal, recognised.diagonal, rtol=1e-12, atol=1e-15)


def test_a_loss_that_is_not_convex_has_no_ggn_diagonal_by_roots():
    p = gallery.regression()
    with pytest.raises(OptionError, match="is not convex in the outputs"):
        ggn_diagonal(p.model, p.batches, p.forward_fn, lambda f, b: (f - b[1]).sin().mean())


def test_batches_that_cannot_be_split_have_no_ggn_diagonal():
    p = gallery.mlp()
    X, y = p.full_batch
    batch = (X, y, ["a text"] * 23)
    with pytest.raises(BatchError, match="it cannot be split"):
        ggn_diagonal(p.model, [batch], p.forward_fn, p.criterion)


def test_the_model_is_the_same_after_a_ggn_diagonal():
    p = gallery.cnn()
    before = {name: t.clone() for name, t in p.model.state_dict().items()}
    ggn_diagonal(p.model, p.batches, p.forward_fn, p.criterion)
    assert all(torch.equal(t, before[name]) for name, t in p.model.state_dict().items())
    assert not any(p.grad is not None for p in p.model.parameters())
