"""Batches of inputs and targets: which part is which, and the losses of the model's outputs."""

from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchlinop import HessianOperator
from torchlinop.errors import BatchError
from torchlinop.losses import (
    CrossEntropy,
    LossOfOutput,
    MeanSquaredError,
    cross_entropy_loss_of_output,
    mse_loss_of_output,
    supervised_forward,
    supervised_loss,
    supervised_loss_of_output,
    supervised_per_sample_loss,
    targets_of,
)
from torchlinop.testing import gallery
from torchlinop.testing.oracles import dense_hessian

X, Y = torch.randn(5, 6, dtype=torch.float64), torch.randint(0, 3, (5,))
Pair = namedtuple("Pair", "image label")
Swapped = namedtuple("Swapped", "label image")
Unnamed = namedtuple("Unnamed", "a b")


@dataclass
class Sample:
    inputs: torch.Tensor
    target: torch.Tensor


BATCHES = {
    "tuple": (X, Y),
    "list": [X, Y],
    "named tuple": Pair(X, Y),
    "named tuple, targets first": Swapped(Y, X),
    "named tuple of other names": Unnamed(X, Y),
    "triple": (X, Y, torch.ones(5)),
    "labels": {"x": X, "labels": Y},
    "targets": {"targets": Y, "inputs": X},
    "y": UserDict({"images": X, "y": Y}),
    "dataclass": Sample(X, Y),
    "labels of a decoder": {"x": X, "decoder_labels": Y},
    "keywords": {"input": X, "label": Y},
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_targets_and_inputs_are_found(batch):
    model = nn.Linear(6, 3).double()
    assert targets_of(batch) is Y
    assert torch.equal(supervised_forward(model, batch), model(X))


class OfKeywords(nn.Module):
    """Takes its inputs by name and gives an object with logits, as Hugging Face's models."""

    def forward(self, features, scale):
        return Logits(features * scale)


@dataclass
class Logits:
    logits: torch.Tensor


def test_other_mappings_are_keywords_without_labels_and_logits_are_taken():
    batch = {"features": X, "scale": 2.0, "labels": Y}
    assert torch.equal(supervised_forward(OfKeywords(), batch), 2 * X)


@pytest.mark.parametrize(
    ("batch", "described"),
    [
        ({"a": X, "b": Y}, "a dict with keys {a, b}"),
        ({"labels": Y}, "a dict with keys {labels}"),
        (X, r"a tensor of shape \(5, 6\)"),
        ((X,), "a tuple of 1 parts"),
    ],
    ids=["names", "labels alone", "tensor", "one part"],
)
def test_unclear_batches_are_refused(batch, described):
    message = (
        f"could not tell inputs from targets in {described}. Give loss_fn.model, batch., or "
        "forward_fn and loss_of_output_fn."
    )
    with pytest.raises(BatchError, match=message):
        supervised_forward(nn.Identity(), batch)


@pytest.mark.parametrize(
    "batch",
    [{"a": X}, X, (X,), (X, "text"), 3],
    ids=["mapping", "tensor", "one part", "text", "number"],
)
def test_batches_without_targets_are_refused(batch):
    with pytest.raises(BatchError, match="could not tell inputs from targets"):
        targets_of(batch)


def test_the_supervised_loss_is_the_criterion_of_outputs_and_targets():
    model = nn.Linear(6, 3).double().requires_grad_(False)
    loss = supervised_loss(nn.CrossEntropyLoss())
    expected = F.cross_entropy(model(X), Y)
    assert float(loss(model, (X, Y))) == pytest.approx(float(expected), rel=1e-13)
    assert loss.weighting.unit == "unmasked labels"
    assert supervised_loss(lambda outputs, targets: outputs.sum()).weighting is None


@pytest.mark.parametrize("batching", ["one batch", "ragged batches"])
def test_its_hessian_is_the_dense_hessian(batching):
    p = gallery.mlp()
    batches = [p.full_batch] if batching == "one batch" else p.batches
    H = HessianOperator(p.model, batches, supervised_loss(nn.CrossEntropyLoss())).to_dense()
    expected = dense_hessian(p.full_loss, p.parameters)
    assert float((H - expected).abs().max() / expected.abs().max()) < 1e-12


def test_losses_of_output_are_recognised_criteria():
    assert isinstance(supervised_loss_of_output(F.mse_loss), MeanSquaredError)
    other = supervised_loss_of_output(lambda outputs, targets: (outputs - targets).abs().sum())
    assert isinstance(other, LossOfOutput)
    assert float(other(torch.ones(2), (None, torch.zeros(2)))) == 2.0


def test_ready_made_losses_take_the_options_of_their_classes():
    loss = cross_entropy_loss_of_output(label_smoothing=0.1, reduction="sum")
    assert isinstance(loss, CrossEntropy)
    f = torch.randn(5, 3, dtype=torch.float64)
    expected = F.cross_entropy(f, Y, label_smoothing=0.1, reduction="sum")
    assert float(loss(f, (X, Y))) == pytest.approx(float(expected))
    mse = mse_loss_of_output(reduction="sum")
    assert float(mse(f, (X, f - 1))) == pytest.approx(15.0)


def quartic(outputs, targets):
    return (outputs.sum(1) - targets).square().square().mean()


@pytest.mark.parametrize(
    ("criterion", "targets"),
    [(nn.CrossEntropyLoss(label_smoothing=0.1), Y), (nn.MSELoss(), X[:, :3]), (quartic, Y)],
    ids=["cross-entropy", "mse", "any"],
)
def test_per_sample_losses_are_those_of_samples_alone(criterion, targets):
    model = nn.Linear(6, 3).double()
    losses = supervised_per_sample_loss(criterion)(model, (X, targets))
    alone = [criterion(model(X[i : i + 1]), targets[i : i + 1]) for i in range(5)]
    assert losses.shape == (5,)
    assert torch.allclose(losses, torch.stack(alone), rtol=1e-12)


Heteroscedastic = namedtuple("Heteroscedastic", "variance x y")


def test_variances_of_a_named_tuple_go_by_name():
    v, x, y = torch.rand(3, 5, 2, dtype=torch.float64)
    loss = supervised_loss_of_output(nn.GaussianNLLLoss())
    expected = F.gaussian_nll_loss(x, y, v)
    assert float(loss(x, Heteroscedastic(v, x, y))) == pytest.approx(float(expected), rel=1e-13)
