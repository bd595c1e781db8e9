"""H v is the dense Hessian's, on every model, batching and derivative."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchlinop import FiniteDifference, HessianOperator, match_names
from torchlinop.batches import tree_map
from torchlinop.testing import gallery
from torchlinop.testing.oracles import (
    curvlinops_hessian,
    dense_hessian,
    least_squares_hessian,
    softmax_regression_hessian,
)

PROBLEMS = {
    "mlp": gallery.mlp,
    "cnn": gallery.cnn,
    "gpt2": gallery.gpt2,
    "llama": gallery.llama,
    "lstm": functools.partial(gallery.recurrent, nn.LSTM),
    "gru": functools.partial(gallery.recurrent, nn.GRU),
    "tied": gallery.tied,
    "checkpointed": gallery.checkpointed,
}


@functools.cache
def problem(name, dtype=torch.float64):
    return PROBLEMS[name](dtype=dtype)


@functools.cache
def oracle(name):
    p = problem(name)
    return dense_hessian(p.full_loss, p.parameters)


def oracle_of_widened(p):
    """The Hessian of a float32 problem, its parameters and data taken to float64 unchanged."""
    p.model.double()
    full = tree_map(lambda t: t.double() if t.is_floating_point() else t, p.full_batch)
    return dense_hessian(lambda: p.loss_fn(p.model, full), p.parameters)


def relative(H, reference):
    return float((H - reference).abs().max() / reference.abs().max())


BATCHINGS = {
    "one batch": lambda p: ([p.full_batch], {}),
    "ragged batches": lambda p: (p.batches, {}),
    "microbatches": lambda p: ([p.full_batch], {"microbatch_size": 2}),
}


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("method", ["autograd", "forward_over_reverse"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_products_with_a_block_are_those_of_the_dense_hessian(name, method, batching):
    p = problem(name)
    batches, options = BATCHINGS[batching](p)
    H = HessianOperator(p.model, batches, p.loss_fn, method=method, **options)
    V = H.space.random(6, seed=1)
    assert relative(H @ V, oracle(name) @ V) < 1e-12
    assert relative(H @ V[:, 0], oracle(name) @ V[:, 0]) < 1e-12


@pytest.mark.parametrize("linearization", ["keep", "rebuild"])
@pytest.mark.parametrize("column_chunk", [1, 4, 16])
@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt2", "lstm"])
def test_keeping_and_chunking_change_no_matrix(name, linearization, column_chunk):
    p = problem(name)
    H = HessianOperator(
        p.model, p.batches, p.loss_fn, linearization=linearization, column_chunk=column_chunk
    )
    V = H.space.random(6, seed=2)
    assert relative(H @ V, oracle(name) @ V) < 1e-12


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_hessian_equals_curvlinops(name):
    p = problem(name)
    reference = curvlinops_hessian(p.model, nn.CrossEntropyLoss(), p.batches)
    H = HessianOperator(p.model, p.batches, p.loss_fn)
    assert relative(H.to_dense(), reference) < 1e-12


class Logits(nn.Module):
    """A language model as curvlinops wants it: inputs to logits, one row a loss term."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(tokens).logits[:, :-1].flatten(0, 1)


class SiLU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_hessian_of_language_models_equals_curvlinops(name):
    # Untied and in one unpadded batch: curvlinops takes tied weights for two variables, weighs
    # batches by samples, and passes no mask.
    p = PROBLEMS[name]()
    p.model.lm_head.weight = nn.Parameter(p.model.lm_head.weight.detach().clone())
    for path, module in list(p.model.named_modules()):
        if type(module).__name__ in ("SiLU", "SiLUActivation"):
            p.model.set_submodule(path, SiLU())  # torch's has no forward rule, which it needs
    tokens = p.full_batch["input_ids"]
    model = Logits(p.model)
    data = [(tokens, tokens[:, 1:].flatten())]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        reference = curvlinops_hessian(model, nn.CrossEntropyLoss(), data)
    H = HessianOperator(model, data, gallery.cross_entropy)
    # Forward through the batched backward of LayerNorm loses a term: curvlinops' rows of its
    # weights are wrong (and its matrix is not symmetric), as the dense oracle shows.
    judged = torch.cat(
        [
            torch.arange(s.offset, s.stop)
            for s in H.layout.slots
            if not ("ln_" in s.name and "weight" in s.name)
        ]
    )
    V = H.space.random(8)
    assert relative((H @ V)[judged], (reference @ V)[judged]) < 1e-12


def test_hessian_is_exact_on_layer_norm_by_both_derivatives():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    batch = (torch.randn(9, 3).double(), torch.randint(0, 2, (9,)))
    truth = dense_hessian(lambda: gallery.cross_entropy(model, batch), list(model.parameters()))
    for method in ("autograd", "forward_over_reverse"):
        H = HessianOperator(model, [batch], gallery.cross_entropy, method=method)
        assert relative(H.to_dense(), truth) < 1e-12


@pytest.mark.parametrize("sizes", [(12,), (5, 5, 2)])
def test_hessian_of_least_squares_is_its_closed_form(sizes):
    X, Y = torch.randn(12, 4).double(), torch.randn(12, 3).double()
    model = nn.Linear(4, 3).double()
    H = HessianOperator(model, gallery.in_batches((X, Y), *sizes), gallery.mean_squared_error)
    assert relative(H.to_dense(), least_squares_hessian(X, 3)) < 1e-14


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_hessian_of_softmax_regression_is_its_closed_form(dtype, tolerance):
    X, y = torch.randn(13, 4, dtype=dtype), torch.randint(0, 3, (13,))
    model = nn.Linear(4, 3, bias=False, dtype=dtype)
    H = HessianOperator(model, gallery.in_batches((X, y), 6, 6, 1), gallery.cross_entropy)
    closed = softmax_regression_hessian(X.double(), model.weight.detach().double())
    assert relative(H.to_dense().double(), closed) < tolerance


@pytest.mark.parametrize("name", PROBLEMS)
def test_float32_products_agree_to_single_precision(name):
    p = PROBLEMS[name](dtype=torch.float32)
    H = HessianOperator(p.model, p.batches, p.loss_fn)
    V = H.space.random(3, seed=3)
    HV = (H @ V).double()
    assert relative(HV, oracle_of_widened(p) @ V.double()) < 1e-5


def test_the_sum_over_batches_is_taken_for_a_summed_loss():
    p = problem("mlp")

    def summed(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    H = HessianOperator(p.model, p.batches, summed)
    assert relative(H.to_dense(), 23 * oracle("mlp")) < 1e-12
    assert "sum over" in repr(H)


def test_a_linear_loss_has_a_zero_hessian():
    model = nn.Linear(3, 1).double()
    H = HessianOperator(model, [torch.ones(2, 3).double()], lambda m, x: m(x).mean())
    assert torch.equal(H.to_dense(), torch.zeros(4, 4).double())


def test_loss_and_gradient_are_those_of_all_data():
    p = problem("mlp")
    H = HessianOperator(p.model, p.batches, p.loss_fn)
    loss = p.full_loss()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, p.parameters)])
    torch.testing.assert_close(H.loss(), loss.detach(), rtol=1e-14, atol=0)
    torch.testing.assert_close(H.gradient(), gradient, rtol=1e-12, atol=1e-15)


def test_the_matrix_stays_the_same_while_training_goes_on():
    p = gallery.cnn()
    H = HessianOperator(p.model, p.batches, p.loss_fn, linearization="rebuild")
    v = H.space.random(1)[:, 0]
    before = H @ v
    with torch.no_grad():
        for tensor in [*p.model.parameters(), *p.model.buffers()]:
            tensor.add_(1)
    assert torch.equal(H @ v, before)


def test_unselected_parameters_stay_where_they_were_while_training_goes_on():
    p = gallery.mlp()
    H = HessianOperator(
        p.model, p.batches, p.loss_fn, linearization="rebuild", param_filter=match_names("2.*")
    )
    v = H.space.random(1)[:, 0]
    before = H @ v
    with torch.no_grad():
        p.model[0].weight.add_(1)
    assert torch.equal(H @ v, before)


def test_a_filter_selects_the_diagonal_block():
    p = problem("mlp")
    H = HessianOperator(p.model, p.batches, p.loss_fn, param_filter=match_names("2.*"))
    assert H.layout.names == ("2.weight", "2.bias")
    assert relative(H.to_dense(), oracle("mlp")[35:, 35:]) < 1e-12


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e12])
def test_finite_differences_do_not_depend_on_the_scale_of_the_direction(scale):
    p = problem("mlp")
    H = HessianOperator(p.model, p.batches, p.loss_fn, method="finite_difference")
    v = H.space.random(1, seed=4)[:, 0]
    # Truncation and rounding balance at u^(2/3) = 2e-11 times the ratio of third to second
    # derivatives, which is about 10 here.
    assert relative((H @ (scale * v)) / scale, oracle("mlp") @ v) < 1e-8


def test_finite_differences_of_zero_are_zero():
    p = problem("mlp")
    H = HessianOperator(p.model, p.batches, p.loss_fn, method="finite_difference")
    assert torch.equal(H @ torch.zeros(53).double(), torch.zeros(53).double())


def test_the_error_of_finite_differences_is_the_truncation_error_to_the_right_of_the_best_step():
    # err(eps) = eps^2/6 |D^3 g[v, v, v]| with g the gradient, for steps where rounding is small.
    p = problem("mlp")
    v = torch.randn(53).double()
    v /= v.norm()
    exact = oracle("mlp") @ v
    third = HessianOperator(p.model, p.batches, p.loss_fn, method="finite_difference", fd_eps=1e-2)
    theta = third.objective.theta

    def gradient(t):
        pieces = third.layout.split(theta + t * v)
        loss = torch.func.functional_call(p.model, pieces, p.full_batch[0])
        return F.cross_entropy(loss, p.full_batch[1])

    def directional(order):
        function = gradient
        for _ in range(order):
            function = torch.func.grad(function)
        return function(torch.zeros((), dtype=torch.float64))

    # v^T D^3 g[v, v, v] is the fourth derivative of t -> f(theta + t v).
    errors = [
        float(
            v
            @ (
                HessianOperator(
                    p.model, p.batches, p.loss_fn, method="finite_difference", fd_eps=eps
                )
                @ v
                - exact
            )
        )
        for eps in (1e-1, 1e-2)
    ]
    predicted = float(directional(4)) / 6
    assert errors[0] == pytest.approx(predicted * 1e-2, rel=0.05)
    assert errors[1] == pytest.approx(predicted * 1e-4, rel=0.01)


def test_finite_differences_in_float32_stay_within_the_bound_of_the_theory():
    # E* = eps*^2 |D^3 g| / 2 is of the order u^(2/3) = 1.5e-5 relative to |H v|, times a modest
    # constant from the ratio of derivatives.
    p = gallery.mlp(torch.float32)
    H = HessianOperator(p.model, p.batches, p.loss_fn, method=FiniteDifference())
    v = H.space.random(1, seed=5)[:, 0]
    Hv = (H @ v).double()
    assert relative(Hv, oracle_of_widened(p) @ v.double()) < 2e-3
