"""Kernels of torch whose second derivative is missing, or wrong, in some version of it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchlinop import HessianOperator
from torchlinop.diagnosis import second_derivatives_explained
from torchlinop.errors import DoubleBackwardError
from torchlinop.formulas import group_norm
from torchlinop.testing import gallery
from torchlinop.testing.oracles import dense_hessian


@pytest.mark.parametrize(("groups", "pixels"), [(1, 2), (2, 2), (2, 3), (4, 1)])
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_is_exact_for_several_vectors_at_once(groups, pixels, affine):
    norm = nn.GroupNorm(groups, 4, affine=affine)
    model = nn.Sequential(nn.Conv1d(1, 4, 1), norm, nn.Tanh(), nn.Flatten()).double()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    X, Y = torch.randn(2, 1, pixels).double(), torch.randn(2, 4 * pixels).double()
    H = HessianOperator(model, [(X, Y)], gallery.mean_squared_error, column_chunk=3)
    expected = dense_hessian(lambda: F.mse_loss(model(X), Y), list(model.parameters()))
    torch.testing.assert_close(H.to_dense(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, -2.0, 0.5, 3.0])])
def test_the_formula_of_group_norm_is_torchs(weight):
    x, bias = torch.randn(3, 4, 2, 2), None if weight is None else weight.cos()
    expected = F.group_norm(x, 2, weight, bias, 1e-3)
    torch.testing.assert_close(group_norm(x, 2, weight, bias, 1e-3), expected)


def test_packed_sequences_are_exact_by_forward_mode():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(2, 3, batch_first=True)

        def forward(self, x):
            packed = nn.utils.rnn.pack_padded_sequence(x, [4, 2], batch_first=True)
            return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]

    model, X, Y = Packed().double(), torch.randn(2, 4, 2).double(), torch.randn(2, 4, 3).double()
    H = HessianOperator(model, [(X, Y)], gallery.mean_squared_error, method="forward_over_reverse")
    V = H.space.random(2)
    expected = dense_hessian(lambda: F.mse_loss(model(X), Y), list(model.parameters()))
    torch.testing.assert_close(H @ V, expected @ V, rtol=1e-11, atol=1e-13)


SCATTERS = {
    "function": lambda z, i, x, **how: torch.scatter_reduce(z, 1, i, x, **how),
    "method": lambda z, i, x, **how: z.scatter_reduce(1, i, x, **how),
    "in place": lambda z, i, x, **how: z.clone().scatter_reduce_(1, i, x, **how),
}


@pytest.mark.parametrize("scatter", SCATTERS)
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("reduce", ["prod", "mean"])
def test_reduced_scatters_are_exact_by_forward_mode(scatter, include_self, reduce):
    model, X, start = nn.Linear(2, 4).double(), torch.randn(3, 2).double(), torch.rand(3, 2) + 0.5
    where, how = torch.tensor([[0, 0, 1, 1]] * 3), {"reduce": reduce, "include_self": include_self}

    def loss(model, x):
        return SCATTERS[scatter](start.double(), where, model(x), **how).sin().mean()

    H = HessianOperator(model, [X], loss, weighting="batch-mean", method="forward_over_reverse")
    expected = dense_hessian(lambda: loss(model, X), list(model.parameters()))
    torch.testing.assert_close(H.to_dense(), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["_cdist_backward", "'_cdist_backward'", "aten::_cdist_backward"])
def test_a_missing_second_derivative_is_named_in_all_spellings_of_torch(name):
    def failing():
        raise NotImplementedError(f"the derivative for {name} is not implemented.")

    with (
        pytest.raises(DoubleBackwardError, match=r"_cdist_backward\" has no second derivative"),
        second_derivatives_explained(nn.Linear(1, 1), lambda: torch.ones(())),
    ):
        failing()
