"""Whatever is called, also if it raises, the user's model and random states are bit-identical."""

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from torchlinop import HessianOperator, as_linear_operator
from torchlinop.errors import TorchlinopError
from torchlinop.testing import gallery

BATCHES = gallery.mlp().batches


def state_of(model):
    """Everything of a model and the process that an operator might disturb."""
    tensors = {
        **{f"parameter {k}": v for k, v in model.named_parameters(remove_duplicate=False)},
        **{f"buffer {k}": v for k, v in model.named_buffers(remove_duplicate=False)},
    }
    return {
        "identity": {k: id(v) for k, v in tensors.items()},
        "values": {k: v.detach().clone() for k, v in tensors.items()},
        "versions": {k: v._version for k, v in tensors.items()},
        "requires_grad": {k: v.requires_grad for k, v in tensors.items()},
        "grads": {k: None if v.grad is None else v.grad.clone() for k, v in tensors.items()},
        "mode": [m.training for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "torch": torch.random.get_rng_state(),
        "numpy": np.random.get_state()[1].copy(),
        "python": random.getstate(),
    }


def assert_equal_states(before, after):
    for key, value in before.items():
        if isinstance(value, dict) and any(isinstance(v, torch.Tensor) for v in value.values()):
            for name, tensor in value.items():
                other = after[key][name]
                assert (tensor is None) == (other is None)
                assert tensor is None or torch.equal(tensor, other), name
        elif isinstance(value, torch.Tensor | np.ndarray):
            assert (value == after[key]).all(), key
        else:
            assert value == after[key], key


class Growing(nn.Module):
    """Registers a module, a buffer and a hook, and appends to a list, whenever it runs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.history = []
        self.cache = {}

    def forward(self, x):
        self.register_buffer("seen", torch.ones(1), persistent=False)
        self.extra = nn.Linear(2, 2)
        self.layer.register_forward_hook(lambda *_: None)
        self.history.append(self.layer(x))
        self.cache["weight"] = self.layer.weight
        return self.history[-1]


def test_what_a_model_registers_while_it_runs_is_gone_afterwards():
    model = Growing().double()
    before = state_of(model)
    H = HessianOperator(model, BATCHES, gallery.cross_entropy, linearization="rebuild")
    H @ torch.ones(H.size).double()
    assert_equal_states(before, state_of(model))
    assert list(dict(model.named_modules())) == ["", "layer"]
    assert not model.history
    assert not model.cache
    assert not model._non_persistent_buffers_set


def test_two_operators_that_share_a_module_can_be_used_from_two_threads():
    p = gallery.mlp()
    wrapped = nn.Sequential(p.model)
    before = state_of(wrapped)
    operators = [
        HessianOperator(m, BATCHES, p.loss_fn, linearization="rebuild") for m in (p.model, wrapped)
    ]
    v = torch.ones(53).double()
    expected = operators[0] @ v
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: operators[i % 2] @ v, range(24)))
    assert all(torch.equal(Hv, expected) for Hv in results)
    assert_equal_states(before, state_of(wrapped))
    assert torch.backends.cuda.flash_sdp_enabled()


class Disturbing(nn.Module):
    """Dropout, BatchNorm, a counter, noise, and one layer in another mode than the rest."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))
        self.calls = 0
        self.last = None

    def forward(self, x):
        self.calls += 1
        self.last = self.body(x)
        return self.head(self.last)


def noisy_loss(model, batch):
    np.random.rand(3), random.random()
    return gallery.cross_entropy(model, batch) + 0 * torch.rand(())


def failing_loss(model, batch):
    noisy_loss(model, batch)
    model.train()
    raise ValueError("of the user's own")


def disturbing(mode="train"):
    model = Disturbing().double().train(mode == "train")
    model.body[1].eval()
    model.head.bias.grad = torch.ones(3).double()
    model.body[0].bias.requires_grad_(False)
    return model


OPERATIONS = {
    "build": lambda H: None,
    "matvec": lambda H: H @ torch.ones(H.size, dtype=H.dtype),
    "matmat": lambda H: H @ torch.ones(H.size, 5, dtype=H.dtype),
    "to_dense": lambda H: H.to_dense(),
    "check": lambda H: H.check(),
    "gradient": lambda H: (H.loss(), H.gradient()),
    "scipy": lambda H: as_linear_operator(H) @ np.ones(H.size),
}


@pytest.mark.filterwarnings("ignore::torchlinop.errors.TrainModeWarning")
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("linearization", ["keep", "rebuild"])
@pytest.mark.parametrize("pin_data", [True, False])
def test_model_and_random_states_are_bit_identical_after(operation, mode, linearization, pin_data):
    if linearization == "keep" and not pin_data:
        linearization = "auto"
    model = disturbing()

    before = state_of(model)
    H = HessianOperator(
        model, BATCHES, noisy_loss, mode=mode, linearization=linearization, pin_data=pin_data
    )
    OPERATIONS[operation](H)
    assert_equal_states(before, state_of(model))


@pytest.mark.filterwarnings("ignore::torchlinop.errors.TrainModeWarning")
@pytest.mark.parametrize("method", ["autograd", "forward_over_reverse", "finite_difference"])
def test_every_method_leaves_the_model_bit_identical(method):
    model = disturbing()
    before = state_of(model)
    H = HessianOperator(model, BATCHES, noisy_loss, method=method)
    H @ torch.ones(H.size, 4, dtype=H.dtype)
    assert_equal_states(before, state_of(model))


@pytest.mark.filterwarnings("ignore::torchlinop.errors.TrainModeWarning")
def test_the_model_is_bit_identical_after_the_users_loss_raised_at_construction():
    model = disturbing()
    before = state_of(model)
    with pytest.raises(ValueError, match="of the user's own"):
        HessianOperator(model, BATCHES, failing_loss)
    assert_equal_states(before, state_of(model))


@pytest.mark.filterwarnings("ignore::torchlinop.errors.TrainModeWarning")
@pytest.mark.parametrize("linearization", ["keep", "rebuild"])
def test_the_model_is_bit_identical_after_the_loss_raised_in_a_product(linearization):
    model = disturbing()
    failing = False

    def loss(model, batch):
        return failing_loss(model, batch) if failing else noisy_loss(model, batch)

    H = HessianOperator(model, BATCHES, loss, linearization=linearization)
    before = state_of(model)
    failing = True
    with pytest.raises(ValueError, match="of the user's own"):
        H @ torch.ones(H.size, dtype=H.dtype)
    assert_equal_states(before, state_of(model))


@pytest.mark.parametrize(
    "loss",
    [lambda m, b: m(b[0]), lambda m, b: 1.0, lambda m, b: m(b[0]).sum().detach()],
    ids=["not a scalar", "a float", "detached"],
)
@pytest.mark.filterwarnings("ignore::torchlinop.errors.TrainModeWarning")
def test_the_model_is_bit_identical_after_it_was_refused(loss):
    model = disturbing()
    before = state_of(model)
    with pytest.raises(TorchlinopError):
        HessianOperator(model, BATCHES, loss)
    assert_equal_states(before, state_of(model))


def test_lists_within_lists_of_a_module_are_given_back():
    class Recording(nn.Linear):
        def forward(self, x):
            self.seen["inputs"].append(x)
            return super().forward(x)

    model = Recording(3, 2)
    model.seen = {"inputs": []}
    H = HessianOperator(model, [torch.ones(2, 3)], lambda m, x: m(x).square().mean())
    H @ H.space.random(2)
    assert model.seen == {"inputs": []}


@pytest.mark.parametrize("make", [gallery.cnn, gallery.gpt2, gallery.recurrent, gallery.tied])
def test_models_of_the_gallery_are_bit_identical_after_products(make):
    p = make()
    before = state_of(p.model)
    H = HessianOperator(p.model, p.batches, p.loss_fn)
    H @ H.space.random(2)
    assert_equal_states(before, state_of(p.model))


def test_the_data_are_bit_identical_after_products():
    p = gallery.mlp()
    before = [tuple(t.clone() for t in batch) for batch in p.batches]
    H = HessianOperator(p.model, p.batches, p.loss_fn, microbatch_size=2)
    H @ H.space.random(2)
    for old, new in zip(before, p.batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
