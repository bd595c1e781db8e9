"""Functions (model, batch): what cannot be called so is refused before any data are read."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchlinop import (
    EmpiricalFisherOperator,
    GGNOperator,
    HessianOperator,
    JacobianOperator,
    KFACOperator,
)
from torchlinop.errors import LossShapeError, OptionError

MODEL = nn.Linear(3, 2)


def unread():
    raise AssertionError("the data were read")
    yield


@pytest.mark.parametrize("make", [HessianOperator, EmpiricalFisherOperator])
@pytest.mark.parametrize(
    ("loss_fn", "why"),
    [
        (nn.CrossEntropyLoss(), "got a CrossEntropyLoss, which takes outputs and targets"),
        (F.mse_loss, "got mse_loss, which takes outputs and targets"),
        (None, "got None, which cannot be called"),
        (lambda model: 0, "got <lambda>, which does not take two arguments"),
        (MODEL, "got a Linear, which does not take two arguments"),
    ],
)
def test_what_is_no_loss_of_model_and_batch_is_refused(make, loss_fn, why):
    message = rf"expected loss_fn to be a function of \(model, batch\), {why}; .*supervised_loss"
    with pytest.raises(OptionError, match=message):
        make(MODEL, unread(), loss_fn)


@pytest.mark.parametrize("make", [GGNOperator, KFACOperator, EmpiricalFisherOperator])
def test_what_is_no_function_of_model_and_batch_gives_no_outputs(make):
    message = "expected forward_fn to be .* got a Linear, which .*; pass .*supervised_forward"
    with pytest.raises(OptionError, match=message):
        make(MODEL, unread(), MODEL, nn.MSELoss())


def test_a_jacobian_is_of_a_function_of_model_and_batch():
    with pytest.raises(OptionError, match=r"expected forward_fn .* lambda model, batch: model"):
        JacobianOperator(MODEL, unread(), None)


def test_functions_without_a_signature_are_called():
    assert HessianOperator(MODEL, torch.ones(1, 3), Signless()).size == 8


class Signless:
    __signature__ = "none"

    def __call__(self, model, batch):
        return model(batch).square().mean()


def test_a_complex_loss_is_refused():
    with pytest.raises(LossShapeError, match=r"returned torch\.complex64, expected a real scalar"):
        HessianOperator(MODEL, torch.ones(1, 3), lambda m, x: torch.fft.fft(m(x)).sum())
