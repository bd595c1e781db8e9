"""Every evaluation finds data and modules as the first one did, whatever it does to them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, TensorDataset

from torchlinop import (
    EmpiricalFisherOperator,
    GGNOperator,
    HessianOperator,
    JacobianOperator,
    KFACOperator,
)
from torchlinop.errors import DataError, ParameterError
from torchlinop.losses import supervised_forward, supervised_loss

CE = nn.CrossEntropyLoss()
WAYS = [
    {"linearization": "keep"},
    {"linearization": "rebuild"},
    {"method": "forward_over_reverse"},
    {"method": "finite_difference"},
    {"pin_data": False},
]
MATRICES = {
    "hessian": lambda *args: HessianOperator(*args, supervised_loss(CE)),
    "ggn": lambda *args: GGNOperator(*args, supervised_forward, CE),
    "fisher of terms": lambda *args: EmpiricalFisherOperator(*args, supervised_forward, CE),
    "fisher of samples": lambda *args: EmpiricalFisherOperator(*args, supervised_loss(CE)),
    "kfac": lambda *args: KFACOperator(*args, supervised_forward, CE),
    "jacobian": lambda *args: JacobianOperator(*args, supervised_forward),
}


class Shift(nn.Module):
    def forward(self, x):
        return x - 1


class ShiftInPlace(nn.Module):
    def forward(self, x):
        return x.sub_(1)


class Accumulating(nn.Module):
    """Adds its input to what it has seen; it has seen nothing when the operator is built."""

    seen = None

    def forward(self, x):
        self.seen = x if self.seen is None else self.seen + x
        return self.seen


class Averaging(nn.Module):
    """Moves a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.average = torch.zeros(2).double()

    def forward(self, x):
        return x + self.average.mul_(0.5).add_(x.detach().mean(0))


def problem(first, last=None):
    """Two models with the same parameters, with other first and last layers; batches (x, y)."""
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), last or nn.Identity()]
    models = [nn.Sequential(layer, *copy.deepcopy(layers)).double() for layer in first]
    X, Y = torch.randn(6, 3).double(), torch.randint(0, 2, (6,))
    return models, [(X[:2].clone(), Y[:2].clone()), (X[2:].clone(), Y[2:].clone())]


def assert_same(A, B, tolerance=1e-12):
    torch.testing.assert_close(A.to_dense(), B.to_dense(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_model_that_writes_into_its_input_has_the_matrix_of_one_that_does_not(matrix):
    (model, writing), batches = problem([Shift(), ShiftInPlace()])
    before = copy.deepcopy(batches)
    A = MATRICES[matrix](writing, batches)
    assert_same(A, MATRICES[matrix](model, before))
    assert all(torch.equal(x, x0) for (x, _), (x0, _) in zip(batches, before, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_products_finds_the_data_as_they_were_given(way):
    (model, writing), batches = problem([Shift(), ShiftInPlace()])
    before = copy.deepcopy(batches)
    H = HessianOperator(writing, batches, supervised_loss(CE), **way)
    assert_same(H, HessianOperator(model, before, supervised_loss(CE)), 1e-8)


@pytest.mark.parametrize("linearization", ["keep", "rebuild"])
def test_a_loss_may_take_parts_out_of_its_batch_and_write_into_them(linearization):
    def loss(model, batch):
        y = batch.pop("y")
        y[y == 1] = 0
        batch["x"] = 2 * batch["x"]
        return CE(model(batch["x"]), y)

    (model,), [(x, y), _] = problem([nn.Identity()])
    batch = {"x": x, "y": y.fill_(1)}
    H = HessianOperator(model, [batch], loss, linearization=linearization)
    expected = HessianOperator(model, [(2 * x, 0 * y)], supervised_loss(CE))
    assert_same(H, expected)
    assert_same(H, expected)
    assert batch["x"] is x
    assert bool((batch["y"] == 1).all())


def test_a_loss_of_outputs_that_writes_into_its_targets_has_the_ggn_of_the_targets_given():
    def loss(outputs, batch):
        return CE(outputs, batch[1].add_(1) - 1)

    (model,), batches = problem([nn.Identity()])
    before = copy.deepcopy(batches)
    G = GGNOperator(model, batches[:1], supervised_forward, loss)
    assert_same(G, GGNOperator(model, before[:1], supervised_forward, CE))
    assert torch.equal(batches[0][1], before[0][1])


@pytest.mark.parametrize("method", ["autograd", "forward_over_reverse", "finite_difference"])
def test_what_an_evaluation_leaves_in_a_module_does_not_reach_the_next_one(method):
    (model,), batches = problem([nn.Identity()])
    (accumulating,), _ = problem([nn.Identity()], Accumulating())
    H = HessianOperator(accumulating, batches, supervised_loss(CE), method=method)
    assert_same(H, HessianOperator(model, batches, supervised_loss(CE)), 1e-8)
    assert accumulating[-1].seen is None


def test_tensors_of_modules_that_are_no_buffers_are_the_same_at_every_evaluation():
    (model,), batches = problem([nn.Identity()], Averaging())
    H = HessianOperator(model, batches, supervised_loss(CE), linearization="rebuild")
    V = H.space.random(2)
    assert torch.equal(H @ V, H @ V)
    assert not model[-1].average.any()


@pytest.mark.parametrize("what", ["data", "a frozen parameter"])
def test_writing_between_products_that_are_rebuilt_is_refused(what):
    (model,), batches = problem([nn.Identity()])
    frozen = model[1].weight.requires_grad_(False)
    H = HessianOperator(model, batches, supervised_loss(CE), linearization="rebuild")
    V = H.space.random(2)
    H @ V
    with torch.no_grad():
        (frozen if what == "a frozen parameter" else batches[0][0]).mul_(2)
    with pytest.raises(DataError, match="was written to after its first product"):
        H @ V


@pytest.mark.parametrize("way", WAYS[:4])
@pytest.mark.parametrize("used", [True, False])
def test_parametrizations_are_computed_anew_where_the_user_caches_them(way, used):
    (model,), batches = problem([nn.Identity()])
    parametrize.register_parametrization(model[1], "weight", nn.Tanh())
    expected = HessianOperator(model, batches, supervised_loss(CE)).to_dense()
    with parametrize.cached():
        if used:
            weight = model[1].weight
        H = HessianOperator(model, batches, supervised_loss(CE), **way).to_dense()
        assert not used or model[1].weight is weight
    torch.testing.assert_close(H, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("register", ["full_backward_hook", "full_backward_pre_hook"])
@pytest.mark.parametrize("matrix", MATRICES)
def test_hooks_that_change_gradients_change_no_matrix(register, matrix):
    (model, hooked), batches = problem([nn.Identity(), nn.Identity()])
    getattr(hooked[3], f"register_{register}")(lambda *args: tuple(2 * g for g in args[1]))
    assert_same(MATRICES[matrix](hooked, batches), MATRICES[matrix](model, batches))


class Clamping(nn.Module):
    def __init__(self, through_data):
        super().__init__()
        self.scale = nn.Parameter(torch.full((2,), 2.0).double())
        self.through_data = through_data

    def forward(self, x):
        with torch.no_grad():
            (self.scale.data if self.through_data else self.scale).mul_(0.5)
        return x * self.scale


@pytest.mark.parametrize("through_data", [True, False])
@pytest.mark.parametrize("matrix", ["hessian", "ggn", "jacobian"])
def test_a_model_that_changes_its_own_parameters_is_refused(through_data, matrix):
    (model,), batches = problem([nn.Identity()], Clamping(through_data))
    with pytest.raises(ParameterError, match=r"changes its own parameters.* clamp or normalise"):
        MATRICES[matrix](model, batches)
    assert bool((model[-1].scale == 2).all())


def test_a_generator_of_the_loaders_own_is_given_back():
    (model,), [(x, y), _] = problem([nn.Identity()])
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(x, y), batch_size=1, shuffle=True, generator=generator)
    state = generator.get_state()
    HessianOperator(model, loader, supervised_loss(CE))
    assert torch.equal(generator.get_state(), state)
