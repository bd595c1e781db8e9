"""Σ_n ω_n Jᵀ M_n J is its definition for every M, loss, batching, model and derivative."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.sparse.linalg as sla
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn

from torchlinop import EKFACOperator, HessianOperator, as_linear_operator, match_names
from torchlinop.errors import LossShapeError, OptionError, SampleMixingError
from torchlinop.losses import CrossEntropy, Terms, supervised_loss, supervised_per_sample_loss
from torchlinop.operators.empirical_fisher import (
    EmpiricalFisherOperator,
    GradientCovarianceOperator,
)
from torchlinop.operators.fisher import FisherOperator
from torchlinop.operators.gauss_newton import GGNOperator
from torchlinop.operators.gradient_outer import GradientOuterOperator
from torchlinop.operators.jacobian import JacobianOperator
from torchlinop.testing import gallery
from torchlinop.testing.gallery import in_batches, of_inputs, unreduced
from torchlinop.testing.oracles import (
    bernoulli_outcomes,
    class_outcomes,
    curvlinops_empirical_fisher,
    curvlinops_fisher_mc,
    curvlinops_ggn,
    dense_empirical_fisher,
    dense_fisher,
    dense_ggn,
    dense_hessian,
    dense_jacobian,
    two_point_outcomes,
)

N, SIZES = 11, (5, 4, 2)
WEIGHTS = torch.tensor([0.2, 1.0, 3.0])
ROOT_HALF = torch.tensor(0.5).double().sqrt()


def relative(A, reference):
    return float((A - reference).abs().max() / reference.abs().max())


# The losses: how torch makes them, their targets, and the distribution they are a likelihood of.


@dataclass(frozen=True)
class Loss:
    criterion: Callable  # reduction -> the loss of torch
    targets: Callable  # () -> all parts of the batch behind the inputs
    outcomes: Callable | None = None  # (outputs, *targets) -> what might have been observed
    datum_weights: Callable = lambda *targets: torch.ones(())  # (N,), or (N, C) of the entries
    log_likelihood: nn.Module | None = None  # without the datum weights; the criterion itself
    head: Callable = nn.Identity  # () -> what follows the MLP

    def terms(self, outputs, drawn, targets):
        """The negative log-likelihood (N,) of drawn targets, times the root of the weight."""
        likelihood = self.log_likelihood or self.criterion("mean")
        likelihood = copy.copy(likelihood)
        likelihood.reduction = "none"
        losses = likelihood(outputs, drawn, *targets[1:])
        weighted = self.datum_weights(*targets).sqrt() * losses
        per_entry = losses.ndim > 1 and not isinstance(likelihood, nn.CrossEntropyLoss)
        return (weighted.sum(-1) if per_entry else weighted).flatten()


def labels(*shape):
    return lambda: (torch.randint(0, 3, (N, *shape)),)


def masked(*shape):
    def make():
        y = torch.randint(0, 3, (N, *shape))
        y.view(-1)[::3] = -100
        y[-4:-1] = -100  # a microbatch of two without any label, a batch with one
        y[-1:] = 1
        return (y,)

    return make


def cross_entropy(**options):
    return lambda reduction: nn.CrossEntropyLoss(reduction=reduction, **options).double()


def of_classes(make_targets, datum_weights=lambda y: torch.ones(()), head=nn.Identity, **options):
    return Loss(
        cross_entropy(**options),
        make_targets,
        lambda f, y: class_outcomes(f),
        datum_weights,
        nn.CrossEntropyLoss(),
        head,
    )


def elementwise(module, make_targets, outcomes=None, **options):
    criterion = options.pop("criterion", {})
    return Loss(
        lambda reduction: module(reduction=reduction, **criterion).double(),
        make_targets,
        outcomes,
        **options,
    )


def normal():
    return (torch.randn(N, 3).double(),)


def bits():
    return (torch.randint(0, 2, (N, 3)).double(),)


def counts():
    return (torch.poisson(torch.full((N, 3), 2.0)).double(),)


def spatial():
    return nn.Sequential(nn.Linear(3, 6), nn.Unflatten(1, (3, 2)))


def single():
    return nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))


POSITIVE = torch.tensor([0.5, 1.0, 4.0])

LOSSES = {
    "cross-entropy": of_classes(labels()),
    "class weights": of_classes(labels(), lambda y: WEIGHTS.double()[y], weight=WEIGHTS),
    "ignored labels": of_classes(masked(), lambda y: (y >= 0).double()),
    "another ignored label": of_classes(labels(), lambda y: (y != 2).double(), ignore_index=2),
    "class weights and ignored labels": of_classes(
        masked(), lambda y: WEIGHTS.double()[y.clamp_min(0)] * (y >= 0), weight=WEIGHTS
    ),
    "label smoothing": of_classes(labels(), label_smoothing=0.1),
    "label smoothing and class weights": of_classes(
        labels(),
        lambda y: 0.7 * WEIGHTS.double()[y] + 0.3 / 3 * WEIGHTS.double().sum(),
        weight=WEIGHTS,
        label_smoothing=0.3,
    ),
    "soft targets": of_classes(lambda: (torch.randn(N, 3).double().softmax(1),)),
    "soft targets and class weights": of_classes(
        lambda: (torch.randn(N, 3).double().softmax(1),),
        lambda q: (q * WEIGHTS.double()).sum(1),
        weight=WEIGHTS,
    ),
    "classes of positions": of_classes(labels(2), head=spatial),
    "weighted, ignored classes of positions": of_classes(
        masked(2),
        lambda y: WEIGHTS.double()[y.clamp_min(0)] * (y >= 0),
        head=spatial,
        weight=WEIGHTS,
    ),
    "squared errors": elementwise(
        nn.MSELoss, normal, lambda f, y: two_point_outcomes(f, ROOT_HALF)
    ),
    "squared errors of positions": elementwise(
        nn.MSELoss,
        lambda: (torch.randn(N, 3, 2).double(),),
        lambda f, y: two_point_outcomes(f, ROOT_HALF),
        head=spatial,
    ),
    "squared errors of single numbers": elementwise(
        nn.MSELoss,
        lambda: (torch.randn(N).double(),),
        lambda f, y: ((p, y[:, 0]) for p, y in two_point_outcomes(f[:, None], ROOT_HALF)),
        head=single,
    ),
    "binary cross-entropy": elementwise(
        nn.BCEWithLogitsLoss, bits, lambda f, y: bernoulli_outcomes(f)
    ),
    "binary cross-entropy with weighted positives": elementwise(
        nn.BCEWithLogitsLoss,
        bits,
        lambda f, y: bernoulli_outcomes(f),
        criterion={"pos_weight": POSITIVE},
        datum_weights=lambda y: y * POSITIVE.double() + 1 - y,
        log_likelihood=nn.BCEWithLogitsLoss(),
    ),
    "binary cross-entropy with weighted entries": elementwise(
        nn.BCEWithLogitsLoss,
        bits,
        lambda f, y: bernoulli_outcomes(f),
        criterion={"weight": POSITIVE},
        datum_weights=lambda y: POSITIVE.double(),
        log_likelihood=nn.BCEWithLogitsLoss(),
    ),
    "Huber": elementwise(nn.HuberLoss, normal, criterion={"delta": 0.7}),
    "smooth L1": elementwise(nn.SmoothL1Loss, normal, criterion={"beta": 0.7}),
    "Poisson": elementwise(
        nn.PoissonNLLLoss, counts, lambda f, y: two_point_outcomes(f.exp(), f.exp().sqrt())
    ),
    "Poisson of rates": elementwise(
        nn.PoissonNLLLoss,
        counts,
        lambda f, y: two_point_outcomes(f, f.sqrt()),
        criterion={"log_input": False, "eps": 0.0},
        head=nn.Softplus,
    ),
    "Gaussian with variances": elementwise(
        nn.GaussianNLLLoss,
        lambda: (torch.randn(N, 3).double(), torch.rand(N, 3).double() + 0.5),
        lambda f, y, var: two_point_outcomes(f, var.sqrt()),
    ),
}
LIKELIHOODS = [name for name, loss in LOSSES.items() if loss.outcomes]


@functools.cache
def problem(name, reduction, dtype=torch.float64):
    loss = LOSSES[name]
    torch.manual_seed(21)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), loss.head())
    full = (torch.randn(N, 4), *loss.targets())
    full = tuple(t.to(dtype) if t.is_floating_point() else t for t in full)
    criterion = loss.criterion(reduction).to(dtype)

    def loss_fn(model, batch):
        return criterion(model(batch[0]), *batch[1:])

    batches = in_batches(full, *SIZES)
    return gallery.Problem(model.to(dtype), batches, loss_fn, full, criterion=criterion)


def omega(p):
    """The weight of a loss term: 1 of a sum, and of a mean what torch divides by."""
    total = copy.copy(p.criterion)
    total.reduction = "sum"
    f = p.outputs().detach()
    return p.loss_of_outputs(f) / total(f, *p.full_batch[1:])


def ggn_of(p, loss=None):
    return dense_ggn(p.loss_of_outputs, p.outputs, p.parameters)


def empirical_fisher_of(p, loss=None):
    def terms():
        return unreduced(p.criterion, p.outputs(), *p.full_batch[1:])

    return dense_empirical_fisher(terms, omega(p), p.parameters)


def fisher_of(p, loss):
    targets = p.full_batch[1:]

    def terms(drawn):
        return loss.terms(p.outputs(), drawn, targets)

    outcomes = loss.outcomes(p.outputs(), *targets)
    return dense_fisher(terms, outcomes, omega(p), p.parameters)


MATRICES = {
    "GGN": (GGNOperator, ggn_of),
    "Fisher": (FisherOperator, fisher_of),
    "empirical Fisher": (EmpiricalFisherOperator, empirical_fisher_of),
}


@functools.cache
def oracle(matrix, name, reduction):
    return MATRICES[matrix][1](problem(name, reduction), LOSSES[name])


@functools.cache
def hessian_of(name, reduction):
    p = problem(name, reduction)
    return dense_hessian(p.full_loss, p.parameters)


def operator(matrix, p, batches, **options):
    return MATRICES[matrix][0](p.model, batches, p.forward_fn, p.criterion, **options)


BATCHINGS = {
    "one batch": lambda p: ([p.full_batch], {}),
    "ragged batches": lambda p: (p.batches, {}),
    "microbatches": lambda p: ([p.full_batch], {"microbatch_size": 2}),
}

ROWS = [
    (matrix, name)
    for matrix in MATRICES
    for name in (LIKELIHOODS if matrix == "Fisher" else LOSSES)
]


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("matrix", "name"), ROWS)
def test_matrix_equals_its_definition(matrix, name, reduction, batching):
    p = problem(name, reduction)
    batches, options = BATCHINGS[batching](p)
    A = operator(matrix, p, batches, **options)
    assert relative(A.to_dense(), oracle(matrix, name, reduction)) < 1e-12


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_hessian_of_every_loss_is_the_dense_hessian(name, reduction, batching):
    p = problem(name, reduction)
    batches, options = BATCHINGS[batching](p)
    H = HessianOperator(p.model, batches, supervised_loss(p.criterion), **options)
    assert relative(H.to_dense(), hessian_of(name, reduction)) < 1e-12


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_ekfac_of_every_loss_has_the_trace_of_the_ggn(name, reduction, batching):
    p = problem(name, reduction)
    batches, options = BATCHINGS[batching](p)
    K = EKFACOperator(p.model, batches, p.forward_fn, p.criterion, **options)
    assert relative(K.trace(), oracle("GGN", name, reduction).trace()) < 1e-12


# The Hessian of all others does not depend on the target that is drawn.
CANONICAL = [name for name in LIKELIHOODS if name != "Poisson of rates"]


@pytest.mark.parametrize("name", CANONICAL)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_exact_fisher_of_a_canonical_likelihood_is_the_ggn(name, reduction):
    assert relative(oracle("Fisher", name, reduction), oracle("GGN", name, reduction)) < 1e-12


@pytest.mark.parametrize("name", LOSSES)
def test_the_ggn_by_autograd_of_the_loss_is_the_same(name):
    p = problem(name, "mean")
    G = operator("GGN", p, p.batches, loss_hvp="autograd")
    assert relative(G.to_dense(), oracle("GGN", name, "mean")) < 1e-12


@pytest.mark.parametrize(("matrix", "name"), ROWS)
def test_matrix_in_float32_is_that_of_its_rounded_model_and_data(matrix, name):
    p = problem(name, "mean", torch.float32)
    A = operator(matrix, p, p.batches).to_dense()
    wide = tuple(t.double() if t.is_floating_point() else t for t in p.full_batch)
    widened = gallery.Problem(
        copy.deepcopy(p.model).double(),
        [wide],
        p.loss_fn,
        wide,
        criterion=copy.deepcopy(p.criterion).double(),
    )
    assert A.dtype == torch.float32
    assert relative(A, MATRICES[matrix][1](widened, LOSSES[name])) < 1e-5


# Where curvlinops is right: it weighs batches by samples, and forward mode has rules.
RIGHT_IN_CURVLINOPS = [
    (curvlinops_ggn, "GGN", "cross-entropy"),
    (curvlinops_ggn, "GGN", "label smoothing"),
    (curvlinops_ggn, "GGN", "soft targets"),
    (curvlinops_ggn, "GGN", "classes of positions"),
    (curvlinops_ggn, "GGN", "squared errors"),
    (curvlinops_ggn, "GGN", "squared errors of positions"),
    (curvlinops_ggn, "GGN", "binary cross-entropy"),
    (curvlinops_ggn, "GGN", "binary cross-entropy with weighted positives"),
    (curvlinops_empirical_fisher, "empirical Fisher", "cross-entropy"),
    (curvlinops_empirical_fisher, "empirical Fisher", "label smoothing"),
    (curvlinops_empirical_fisher, "empirical Fisher", "classes of positions"),
    (curvlinops_empirical_fisher, "empirical Fisher", "squared errors"),
    (curvlinops_empirical_fisher, "empirical Fisher", "squared errors of positions"),
    (curvlinops_empirical_fisher, "empirical Fisher", "binary cross-entropy"),
]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("reference", "matrix", "name"), RIGHT_IN_CURVLINOPS)
def test_matrix_equals_curvlinops(reference, matrix, name, reduction):
    p = problem(name, reduction)
    A = operator(matrix, p, p.batches)
    assert relative(A.to_dense(), reference(p.model, p.criterion, p.batches)) < 1e-12


# Losses of the user's own, of which nothing is known.


def quartic(outputs, batch):
    return (F.softplus(outputs - batch[1]) ** 4).mean()


def total_of_cosh(outputs, batch):
    return (outputs - batch[1]).cosh().sum()


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize(("loss", "weight"), [(quartic, 1 / N), (total_of_cosh, 1.0)])
def test_matrices_of_a_callable_equal_their_definitions(loss, weight, batching):
    p = problem("squared errors", "mean")
    batches, options = BATCHINGS[batching](p)

    def terms():
        samples = zip(p.outputs().split(1), p.full_batch[1].split(1), strict=True)
        return torch.stack([loss(f, (None, y)) for f, y in samples])

    ggn = dense_ggn(lambda f: loss(f, p.full_batch), p.outputs, p.parameters)
    fisher = dense_empirical_fisher(terms, weight, p.parameters)
    G = GGNOperator(p.model, batches, of_inputs, loss, **options)
    EF = EmpiricalFisherOperator(p.model, batches, of_inputs, loss, **options)
    assert relative(G.to_dense(), ggn) < 1e-12
    assert relative(EF.to_dense(), fisher) < 1e-12


class WithProduct:
    """A callable that brings the product with its Hessian along."""

    def __call__(self, outputs, batch):
        return quartic(outputs, batch)

    def hvp(self, outputs, batch, u):
        return torch.func.jvp(torch.func.grad(lambda f: quartic(f, batch)), (outputs,), (u,))[1]


def test_the_ggn_uses_the_hvp_that_a_loss_brings():
    p = problem("squared errors", "mean")
    G = GGNOperator(p.model, p.batches, of_inputs, WithProduct())
    truth = dense_ggn(lambda f: quartic(f, p.full_batch), p.outputs, p.parameters)
    assert relative(G.to_dense(), truth) < 1e-12


FUNCTIONALS = {
    "cross-entropy": F.cross_entropy,
    "class weights": functools.partial(F.cross_entropy, weight=WEIGHTS.double()),
    "label smoothing": functools.partial(F.cross_entropy, label_smoothing=0.1),
    "squared errors": F.mse_loss,
    "binary cross-entropy": F.binary_cross_entropy_with_logits,
    "Huber": functools.partial(F.huber_loss, delta=0.7),
    "Poisson": F.poisson_nll_loss,
    "Gaussian with variances": F.gaussian_nll_loss,
}


@pytest.mark.parametrize("matrix", ["GGN", "empirical Fisher"])
@pytest.mark.parametrize("name", FUNCTIONALS)
def test_functionals_give_the_matrices_of_the_modules(name, matrix):
    p = problem(name, "mean")
    A = MATRICES[matrix][0](p.model, p.batches, of_inputs, FUNCTIONALS[name])
    assert relative(A.to_dense(), oracle(matrix, name, "mean")) < 1e-12


# The models, among them what curvlinops refuses or gets wrong.

MODELS = {
    "tanh MLP": gallery.mlp,
    "CNN with BatchNorm": gallery.cnn,
    "class weights in several batches": gallery.weighted_classes,
    "ignored labels in several batches": gallery.masked_labels,
    "tied embedding and head": gallery.tied,
    "a module used twice": gallery.reused_module,
    "MultiheadAttention (SDPA)": gallery.attention,
    "TransformerEncoderLayer (SDPA)": gallery.transformer,
    "GroupNorm and SiLU": gallery.group_norm,
    "LSTM": functools.partial(gallery.recurrent, nn.LSTM),
    "GRU": functools.partial(gallery.recurrent, nn.GRU),
    "weight_norm": gallery.weight_norm,
    "checkpointing": gallery.checkpointed,
    "custom autograd Function": gallery.custom_function,
    "grouped, circular and dilated convolutions": gallery.convolutions,
    "labels of a sequence that mixes steps": gallery.labelled_sequences,
    "targets of a sequence that mixes steps": gallery.real_sequences,
    "binary labels": gallery.binary,
    "regression": gallery.regression,
    "deep linear": gallery.deep_linear,
}


@functools.cache
def model(name):
    return MODELS[name]()


# All of these likelihoods are canonical.
ORACLES = {"GGN": ggn_of, "Fisher": ggn_of, "empirical Fisher": empirical_fisher_of}


@functools.cache
def oracle_of_model(matrix, name):
    return ORACLES[matrix](model(name))


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("method", ["autograd", "forward_over_reverse"])
@pytest.mark.parametrize("name", MODELS)
def test_products_equal_those_of_the_dense_matrix_on_every_model(name, method, matrix):
    p = model(name)
    A = operator(matrix, p, p.batches, method=method)
    V = A.space.random(6, seed=1)
    assert relative(A @ V, oracle_of_model(matrix, name) @ V) < 1e-12
    assert relative(A @ V[:, 0], oracle_of_model(matrix, name) @ V[:, 0]) < 1e-12


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize(
    "name", ["tanh MLP", "LSTM", "GroupNorm and SiLU", "custom autograd Function"]
)
def test_finite_differences_are_off_by_their_theory_alone(name, matrix):
    # Central differences of the outputs: truncation and rounding balance at u^(2/3) = 4e-11, times
    # the ratio of third to first derivatives along v, which is below 100 here.
    p = model(name)
    A = operator(matrix, p, p.batches, method="finite_difference")
    V = A.space.random(6, seed=1)
    assert relative(A @ V, oracle_of_model(matrix, name) @ V) < 4e-9


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e12])
def test_finite_differences_do_not_depend_on_the_scale_of_the_direction(matrix, scale):
    p = model("tanh MLP")
    A = operator(matrix, p, p.batches, method="finite_difference")
    v = A.space.random(1, seed=4)[:, 0]
    assert relative((A @ (scale * v)) / scale, oracle_of_model(matrix, "tanh MLP") @ v) < 4e-9


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("linearization", ["keep", "rebuild"])
@pytest.mark.parametrize("column_chunk", [1, 4, 16])
def test_keeping_and_chunking_change_no_matrix(matrix, linearization, column_chunk):
    p = model("LSTM")
    options = {"linearization": linearization, "column_chunk": column_chunk}
    A = operator(matrix, p, p.batches, **options)
    V = A.space.random(6, seed=2)
    assert relative(A @ V, oracle_of_model(matrix, "LSTM") @ V) < 1e-12


@pytest.mark.parametrize("matrix", MATRICES)
def test_columns_of_a_block_are_products_of_their_own(matrix):
    p = model("tanh MLP")
    A = operator(matrix, p, p.batches)
    V = A.space.random(5)
    columns = torch.stack([A @ v for v in V.unbind(1)], dim=1)
    assert relative(A @ V, columns) < 1e-12


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("name", ["tanh MLP", "TransformerEncoderLayer (SDPA)"])
def test_matrix_is_positive_semidefinite_and_symmetric(matrix, name):
    p = model(name)
    A = operator(matrix, p, p.batches).to_dense()
    assert relative(A, A.T) < 1e-14
    eigenvalues = torch.linalg.eigvalsh(A)
    assert eigenvalues[0] > -1e-14 * len(A) * eigenvalues[-1]


def test_the_ggn_of_least_squares_in_a_linear_model_is_the_hessian():
    torch.manual_seed(3)
    linear = nn.Linear(4, 3).double()
    batch = (torch.randn(9, 4).double(), torch.randn(9, 3).double())
    truth = dense_hessian(lambda: F.mse_loss(linear(batch[0]), batch[1]), list(linear.parameters()))
    G = GGNOperator(linear, [batch], of_inputs, nn.MSELoss())
    assert relative(G.to_dense(), truth) < 1e-12


# Parameters: what is selected, and that the model is given back.


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_filter_selects_the_diagonal_block_and_so_does_a_restriction(matrix):
    p = model("tanh MLP")
    block = oracle_of_model(matrix, "tanh MLP")[35:, 35:]
    filtered = operator(matrix, p, p.batches, param_filter=match_names("2.*"))
    restricted = operator(matrix, p, p.batches).restrict(match_names("2.*"))
    assert filtered.layout.names == restricted.layout.names == ("2.weight", "2.bias")
    assert relative(filtered.to_dense(), block) < 1e-12
    assert relative(restricted.to_dense(), block) < 1e-12


@pytest.mark.parametrize("matrix", MATRICES)
def test_products_are_detached_and_new_memory(matrix):
    p = model("tanh MLP")
    A = operator(matrix, p, p.batches)
    v = torch.ones(A.size).double().requires_grad_()
    first = A @ v
    kept = first.clone()
    A @ (2 * v)
    assert not first.requires_grad
    assert torch.equal(first, kept)
    assert torch.equal(A @ v, kept)


@pytest.mark.parametrize("linearization", ["keep", "rebuild"])
@pytest.mark.parametrize("matrix", MATRICES)
def test_the_matrix_stays_the_same_while_training_goes_on(matrix, linearization):
    p = gallery.cnn()
    A = operator(matrix, p, p.batches, linearization=linearization)
    v = A.space.random(1)[:, 0]
    before = A @ v
    with torch.no_grad():
        for tensor in [*p.model.parameters(), *p.model.buffers()]:
            tensor.add_(1)
    assert torch.equal(A @ v, before)


def fingerprint(model):
    """Every parameter and buffer with its version, every mode, and the random state."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {name: (id(t), t._version, t.detach().clone()) for name, t in state.items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    grads = [p.grad is None for p in model.parameters()]
    return values, [m.training for m in model.modules()], hooks, grads, torch.get_rng_state()


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("method", ["autograd", "forward_over_reverse", "finite_difference"])
@pytest.mark.parametrize("make", [gallery.cnn, gallery.weight_norm, gallery.transformer])
def test_the_model_is_bit_identical_after_products(make, method, matrix):
    p = make()
    values, *rest = fingerprint(p.model)
    A = operator(matrix, p, p.batches, method=method)
    A @ A.space.random(3)
    values_after, *rest_after = fingerprint(p.model)
    assert values.keys() == values_after.keys()
    for (identity, version, value), after in zip(
        values.values(), values_after.values(), strict=True
    ):
        assert (identity, version) == after[:2]
        assert torch.equal(value, after[2])
    assert rest[:-1] == rest_after[:-1]
    assert torch.equal(rest[-1], rest_after[-1])


# The Monte Carlo Fisher: one matrix, an average over targets drawn from the model.

CATEGORICAL = [
    "cross-entropy",
    "class weights",
    "ignored labels",
    "label smoothing and class weights",
    "soft targets",
]


def monte_carlo(name, batches=None, *, mc_samples=1, **options):
    p = problem(name, "mean")
    return operator("Fisher", p, batches or p.batches, mc_samples=mc_samples, **options)


def drawn_gradients(name):
    """Probabilities (N,) and gradients (N, n) of the weighted terms for every outcome."""
    p, loss = problem(name, "mean"), LOSSES[name]
    targets = p.full_batch[1:]

    def terms(drawn):
        return loss.terms(p.outputs(), drawn, targets)

    for probability, y in loss.outcomes(p.outputs(), *targets):
        yield probability, dense_jacobian(functools.partial(terms, y), p.parameters)


def drawn_counts(name, F_drawn, mc_samples):
    """How often each class was drawn for each datum (N, C): F is linear in these counts."""
    _, gradients = zip(*drawn_gradients(name), strict=True)
    G = torch.stack(gradients, dim=1)
    outer = G[..., :, None] * G[..., None, :] * float(omega(problem(name, "mean"))) / mc_samples
    counted = G.square().sum((1, 2)) > 0
    A = outer[counted].flatten(2).flatten(0, 1).T
    scale = A.norm(dim=0)
    counts = torch.linalg.lstsq(A / scale, F_drawn.reshape(-1, 1)).solution[:, 0] / scale
    assert relative(A @ counts, F_drawn.flatten()) < 1e-10
    return counts.view(-1, 3), counted


@pytest.mark.parametrize("linearization", ["keep", "rebuild"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_monte_carlo_fisher_is_one_fixed_matrix(name, linearization):
    drawn = monte_carlo(name, linearization=linearization)
    v = drawn.space.random(1)[:, 0]
    first = drawn @ v
    torch.manual_seed(99)
    assert torch.equal(drawn @ v, first)
    assert torch.equal(monte_carlo(name, linearization=linearization) @ v, first)
    assert relative(monte_carlo(name, sampling_seed=1) @ v, first) > 1e-3


@pytest.mark.parametrize("mc_samples", [1, 3])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_drawn_targets_do_not_depend_on_the_batching(name, mc_samples):
    whole = [problem(name, "mean").full_batch]
    expected = monte_carlo(name, whole, mc_samples=mc_samples).to_dense()
    ragged = monte_carlo(name, mc_samples=mc_samples)
    micro = monte_carlo(name, whole, mc_samples=mc_samples, microbatch_size=2)
    assert relative(ragged.to_dense(), expected) < 1e-12
    assert relative(micro.to_dense(), expected) < 1e-12


@pytest.mark.parametrize("mc_samples", [1, 3])
@pytest.mark.parametrize("name", CATEGORICAL)
def test_the_monte_carlo_fisher_is_the_average_over_drawn_labels(name, mc_samples):
    F_drawn = monte_carlo(name, mc_samples=mc_samples).to_dense()
    counts, _ = drawn_counts(name, F_drawn, mc_samples)
    assert (counts - counts.round()).abs().max() < 1e-6
    assert counts.min() > -1e-6
    assert (counts.sum(1) - mc_samples).abs().max() < 1e-6


def test_drawn_labels_follow_the_probabilities_of_the_model():
    name, mc_samples = "cross-entropy", 300
    F_drawn = monte_carlo(name, mc_samples=mc_samples).to_dense()
    counts, _ = drawn_counts(name, F_drawn, mc_samples)
    expected = mc_samples * problem(name, "mean").outputs().detach().softmax(1)
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert 1e-3 < scipy.stats.chi2.sf(chi_squared, df=2 * N) < 1 - 1e-3


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_expectation_of_the_monte_carlo_fisher_is_the_exact_one(name):
    v = torch.randn(oracle("Fisher", name, "mean").shape[0]).double()
    exact = v @ oracle("Fisher", name, "mean") @ v
    drawn = [monte_carlo(name, mc_samples=4, sampling_seed=seed) for seed in range(25)]
    values = torch.stack([v @ (A @ v) for A in drawn])
    z = (values.mean() - exact) / (values.std() / 5)
    assert abs(float(z)) < 4


@pytest.mark.parametrize("mc_samples", [1, 4, 16])
def test_the_squared_error_of_the_monte_carlo_fisher_is_its_variance_over_the_samples(mc_samples):
    name = "cross-entropy"
    weight = float(omega(problem(name, "mean")))
    P, G = map(torch.stack, zip(*drawn_gradients(name), strict=True))  # (C, N), (C, N, n)
    second = (P * (G.square().sum(2)) ** 2).sum()
    mean = torch.einsum("cn,cni,cnj->nij", P, G, G)
    variance = weight**2 * (second - mean.square().sum())  # of one sample a datum
    exact = oracle("Fisher", name, "mean")
    errors = torch.stack(
        [
            (monte_carlo(name, mc_samples=mc_samples, sampling_seed=s).to_dense() - exact)
            .square()
            .sum()
            for s in range(25)
        ]
    )
    z = (errors.mean() - variance / mc_samples) / (errors.std() / 5)
    assert abs(float(z)) < 4


class LabelsOfCurvlinops(CrossEntropy):
    """Cross-entropy with the labels that curvlinops draws for one batch and one sample."""

    def sampled(self, outputs, batch, uniform):
        generator = torch.Generator().manual_seed(2147483647)
        P = outputs.softmax(1)
        y = P.multinomial(1, replacement=True, generator=generator)[:, 0]
        return Terms(P - F.one_hot(y, 3), P.new_tensor(1 / len(P)), (-1,))


def test_the_monte_carlo_fisher_equals_curvlinops_on_the_same_labels():
    p = problem("cross-entropy", "mean")
    batches = [p.full_batch]
    A = FisherOperator(p.model, batches, of_inputs, LabelsOfCurvlinops(), mc_samples=1)
    assert relative(A.to_dense(), curvlinops_fisher_mc(p.model, p.criterion, batches)) < 1e-12


# The Jacobian: all outputs, in the order of the data.


def jacobian(name, batches=None, **options):
    p = model(name)
    return JacobianOperator(p.model, batches or p.batches, p.forward_fn, **options)


JACOBIANS = [
    "tanh MLP",
    "LSTM",
    "labels of a sequence that mixes steps",
    "custom autograd Function",
]


@functools.cache
def dense_jacobian_of(name):
    p = model(name)
    return dense_jacobian(p.outputs, p.parameters)


@pytest.mark.parametrize("method", ["autograd", "forward_over_reverse"])
@pytest.mark.parametrize("name", JACOBIANS)
def test_jacobian_equals_its_definition(name, method):
    truth = dense_jacobian_of(name)
    J = jacobian(name, method=method)
    assert J.shape == truth.shape
    assert relative(J.to_dense(), truth) < 1e-12
    assert relative(J.T.to_dense(), truth.T) < 1e-12


@pytest.mark.parametrize("name", JACOBIANS)
def test_products_with_the_jacobian_and_its_transpose_are_those_of_the_dense_one(name):
    J, truth = jacobian(name), dense_jacobian_of(name)
    m, n = truth.shape
    V, U = torch.randn(n, 4).double(), torch.randn(m, 4).double()
    assert relative(J.matmat(V), truth @ V) < 1e-12
    assert relative(J.rmatmat(U), truth.T @ U) < 1e-12
    assert relative(J.matvec(V[:, 0]), truth @ V[:, 0]) < 1e-12
    assert relative(J.rmatvec(U[:, 0]), truth.T @ U[:, 0]) < 1e-12
    assert relative(J.T @ U, truth.T @ U) < 1e-12


@pytest.mark.parametrize("name", JACOBIANS)
def test_the_transpose_is_the_adjoint(name):
    J = jacobian(name)
    m, n = J.shape
    v, u = torch.randn(n).double(), torch.randn(m).double()
    Jv, Ju = J.matvec(v), J.rmatvec(u)
    assert abs(u @ Jv - Ju @ v) < 1e-14 * (u.norm() * Jv.norm() + v.norm() * Ju.norm())


@pytest.mark.parametrize("name", JACOBIANS)
def test_the_ggn_of_half_the_squared_outputs_is_the_gram_matrix_of_the_jacobian(name):
    p = model(name)
    G = GGNOperator(p.model, p.batches, p.forward_fn, lambda f, batch: f.square().sum() / 2)
    V = G.space.random(3)
    J = jacobian(name)
    assert relative(J.rmatmat(J.matmat(V)), G @ V) < 1e-12


def test_svds_of_the_jacobian_are_the_singular_values_of_the_dense_one():
    J = as_linear_operator(jacobian("tanh MLP"))
    singular = sla.svds(J, k=5, v0=np.ones(min(J.shape)), return_singular_vectors=False)
    truth = torch.linalg.svdvals(dense_jacobian_of("tanh MLP"))[:5].numpy()
    assert np.abs(np.sort(singular)[::-1] - truth).max() < 1e-10 * truth.max()


def test_a_filter_selects_columns_of_the_jacobian():
    J = jacobian("tanh MLP", param_filter=match_names("2.*"))
    assert relative(J.to_dense(), dense_jacobian_of("tanh MLP")[:, 35:]) < 1e-12


# Gradients: of the loss of samples, their covariance, and the outer product of their mean.

ONE_TERM_A_SAMPLE = ["cross-entropy", "ignored labels", "label smoothing", "soft targets"]


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ONE_TERM_A_SAMPLE)
def test_the_empirical_fisher_of_a_loss_fn_is_that_of_the_loss_of_outputs(
    name, reduction, batching
):
    p = problem(name, reduction)
    batches, options = BATCHINGS[batching](p)
    A = EmpiricalFisherOperator(p.model, batches, p.loss_fn, per_sample=True, **options)
    assert relative(A.to_dense(), oracle("empirical Fisher", name, reduction)) < 1e-12


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("name", ["cross-entropy", "label smoothing", "soft targets"])
def test_the_empirical_fisher_of_losses_of_samples_is_that_of_the_loss_of_outputs(name, batching):
    p = problem(name, "mean")
    batches, options = BATCHINGS[batching](p)
    losses = supervised_per_sample_loss(p.criterion)
    A = EmpiricalFisherOperator(p.model, batches, losses, **options)
    assert relative(A.to_dense(), oracle("empirical Fisher", name, "mean")) < 1e-12


def test_squared_errors_averaged_over_three_outputs_have_a_third_of_the_empirical_fisher():
    p = problem("squared errors", "mean")
    A = EmpiricalFisherOperator(p.model, p.batches, p.loss_fn)
    truth = oracle("empirical Fisher", "squared errors", "mean") / 3
    assert relative(A.to_dense(), truth) < 1e-12


@pytest.mark.parametrize(
    "name", ["CNN with BatchNorm", "LSTM", "checkpointing", "custom autograd Function"]
)
@pytest.mark.parametrize("method", ["autograd", "forward_over_reverse"])
def test_gradients_of_samples_are_exact_where_no_pass_can_be_vectorised(name, method):
    p = model(name)
    A = EmpiricalFisherOperator(p.model, p.batches, p.loss_fn, method=method)
    V = A.space.random(3)
    assert relative(A @ V, oracle_of_model("empirical Fisher", name) @ V) < 1e-12


def test_the_empirical_fisher_of_batches_is_the_second_moment_of_their_gradients():
    p = problem("cross-entropy", "mean")
    G = torch.stack([flat_gradient(p, batch) for batch in p.batches])
    shares = torch.tensor(SIZES).double() / N
    A = EmpiricalFisherOperator(p.model, p.batches, p.loss_fn, per_sample=False)
    assert relative(A.to_dense(), G.T @ (shares[:, None] * G)) < 1e-12


def flat_gradient(p, batch):
    parts = torch.autograd.grad(p.loss_fn(p.model, batch), p.parameters)
    return torch.cat([part.flatten() for part in parts])


def terms_that_count(p):
    """The loss terms of labels that are not ignored."""

    def terms():
        losses = unreduced(p.criterion, p.outputs(), *p.full_batch[1:])
        labels = p.full_batch[1].flatten()
        ignored = getattr(p.criterion, "ignore_index", None)
        return losses if labels.is_floating_point() else losses[labels != ignored]

    return terms


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_covariance_of_gradients_is_their_second_moment_about_their_mean(name, reduction):
    p = problem(name, reduction)
    G = dense_jacobian(terms_that_count(p), p.parameters)
    centred = G - G.mean(0)
    truth = omega(p) * centred.T @ centred
    C = GradientCovarianceOperator(p.model, p.batches, of_inputs, p.criterion)
    assert relative(C.to_dense(), truth) < 1e-12


@pytest.mark.parametrize("name", ["cross-entropy", "class weights", "squared errors"])
def test_the_outer_product_of_the_gradient_is_that_of_all_data(name):
    p = problem(name, "mean")
    g = flat_gradient(p, p.full_batch)
    A = GradientOuterOperator(p.model, p.batches, supervised_loss(p.criterion))
    assert relative(A.to_dense(), g[:, None] * g) < 1e-12


# Batch statistics in train mode: fine where the matrix is one of batches, else refused.


@pytest.mark.parametrize("matrix", ["GGN", "Fisher"])
def test_batch_norm_in_train_mode_has_the_ggn_of_its_batch(matrix):
    p = gallery.cnn()
    p.model[5].p = 0.0
    A = operator(matrix, p, [p.full_batch], mode="train")
    p.model.train()
    assert relative(A.to_dense(), ggn_of(p)) < 1e-12


def contrastive(outputs, batch):
    z = F.normalize(outputs)
    return F.cross_entropy(z @ z.mT, torch.arange(len(z)))


class Centred(nn.Module):
    """Subtracts the mean over the batch, unnoticed by any name."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(x) - self.layer(x).mean(0)


def empirical(model, p, *functions, **options):
    return EmpiricalFisherOperator(model, p.batches, *functions, **options)


CE = nn.CrossEntropyLoss()
PER_SAMPLE = {
    "empirical Fisher": lambda m, p, **o: empirical(m, p, of_inputs, CE, **o),
    "empirical Fisher of loss_fn": lambda m, p, **o: empirical(m, p, gallery.cross_entropy, **o),
    "Monte Carlo Fisher": lambda m, p, **o: FisherOperator(
        m, p.batches, of_inputs, CE, mc_samples=1, **o
    ),
    "covariance": lambda m, p, **o: GradientCovarianceOperator(m, p.batches, of_inputs, CE, **o),
}


@pytest.mark.parametrize("matrix", PER_SAMPLE)
def test_batch_norm_in_train_mode_has_no_matrix_of_samples(matrix):
    p = gallery.cnn()
    with pytest.raises(SampleMixingError, match="BatchNorm 1 uses the batch in train mode"):
        PER_SAMPLE[matrix](p.model, p, mode="train")


@pytest.mark.parametrize("matrix", PER_SAMPLE)
def test_a_model_whose_outputs_depend_on_other_samples_has_no_matrix_of_samples(matrix):
    with pytest.raises(SampleMixingError, match=r"other outputs|does not mix samples"):
        PER_SAMPLE[matrix](Centred().double(), gallery.mlp())


CONTRASTIVE = {
    "loss of outputs": (of_inputs, contrastive),
    "loss_fn": (lambda m, b: contrastive(m(b[0]), b),),
}


@pytest.mark.parametrize("form", CONTRASTIVE)
@pytest.mark.parametrize("sizes", [(23,), (9, 9, 5)])
def test_a_contrastive_loss_has_no_empirical_fisher(form, sizes):
    p = gallery.mlp(sizes=sizes)
    before = fingerprint(p.model)[1:4]
    with pytest.raises(SampleMixingError, match="does not mix samples, for a per-sample matrix"):
        empirical(p.model, p, *CONTRASTIVE[form])
    assert fingerprint(p.model)[1:4] == before


@pytest.mark.parametrize("form", CONTRASTIVE)
@pytest.mark.parametrize("option", [{"weighting": "batch-mean"}, {"weight": lambda b: len(b[0])}])
def test_a_contrastive_loss_is_refused_also_where_the_weights_of_batches_are_given(form, option):
    p = gallery.mlp()
    message = "mixes samples|the loss of a batch is .*, the sum of those of its samples, .*, 0,"
    with pytest.raises(SampleMixingError, match=message):
        empirical(p.model, p, *CONTRASTIVE[form], **option)


@pytest.mark.parametrize("mc_samples", [None, 2])
@pytest.mark.parametrize("name", ["Huber", "smooth L1"])
def test_a_loss_that_is_no_likelihood_has_no_fisher(name, mc_samples):
    p = problem(name, "mean")
    with pytest.raises(OptionError, match="is not the negative log-likelihood"):
        operator("Fisher", p, p.batches, mc_samples=mc_samples)


@pytest.mark.parametrize(
    ("matrix", "options", "message"),
    [
        ("Fisher", {"mc_samples": 0}, "mc_samples to be an integer of at least 1, got 0"),
        ("GGN", {"loss_hvp": "exact"}, "unknown loss_hvp 'exact'; choose one of analytical, auto"),
        ("GGN", {"method": "exact"}, "unknown method 'exact'; choose one of autograd"),
        ("GGN", {"fd_eps": 1e-3}, "fd_eps is the positive step length"),
    ],
)
def test_options_that_do_not_exist_are_refused(matrix, options, message):
    p = model("tanh MLP")
    with pytest.raises(OptionError, match=message):
        operator(matrix, p, p.batches, **options)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda m, b: (m(b[0]),), "forward_fn returned tuple, expected one floating-point tensor"),
        (lambda m, b: m(b[0]).argmax(1), "forward_fn returned torch.int64"),
        (lambda m, b: m(b[0]).detach(), "does not require grad"),
    ],
)
@pytest.mark.parametrize("build", [o for o, _ in MATRICES.values()])
def test_outputs_that_are_no_tensor_with_a_graph_are_refused(build, forward, message):
    p = model("tanh MLP")
    with pytest.raises(LossShapeError, match=message):
        build(p.model, p.batches, forward, CE)
