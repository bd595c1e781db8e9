"""Losses of single entries: their closed forms are the derivatives of torch's own losses."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from torchlinop.errors import DataError, LossShapeError, OptionError
from torchlinop.losses import (
    BinaryCrossEntropyWithLogits,
    GaussianNLL,
    Huber,
    MeanSquaredError,
    PoissonNLL,
    PoissonRateNLL,
    SmoothL1,
)
from torchlinop.losses.poisson import poisson_quantile

W = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64)
RHO = torch.tensor([3.0, 0.4, 1.0], dtype=torch.float64)
bce = F.binary_cross_entropy_with_logits
rate = functools.partial(F.poisson_nll_loss, log_input=False)


def gaussian(f, y, v, **options):
    return F.gaussian_nll_loss(f, y, v, **options)


# name: loss here, torch's, options of both, outputs' and targets' kind
LOSSES = {
    "mse": (MeanSquaredError, F.mse_loss, {}, "real"),
    "bce": (BinaryCrossEntropyWithLogits, bce, {}, "binary"),
    "weighted bce": (BinaryCrossEntropyWithLogits, bce, {"weight": W, "pos_weight": RHO}, "binary"),
    "soft bce": (BinaryCrossEntropyWithLogits, bce, {"pos_weight": RHO}, "share"),
    "huber": (Huber, F.huber_loss, {"delta": 0.7}, "real"),
    "smooth l1": (SmoothL1, F.smooth_l1_loss, {"beta": 0.7}, "real"),
    "poisson": (PoissonNLL, F.poisson_nll_loss, {}, "count"),
    "full poisson": (PoissonNLL, F.poisson_nll_loss, {"full": True}, "count"),
    "poisson rate": (PoissonRateNLL, rate, {"eps": 0.01, "full": True}, "rate"),
    "gaussian": (GaussianNLL, gaussian, {"full": True, "eps": 0.3}, "variance"),
}
LIKELIHOODS = [name for name in LOSSES if name not in ("huber", "smooth l1")]


def problem(kind, shape=(5, 3)):
    f = torch.randn(shape, dtype=torch.float64)
    y = {
        "real": torch.randn(shape).double,
        "variance": torch.randn(shape).double,
        "binary": torch.randint(0, 2, shape).double,
        "share": torch.rand(shape).double,
        "count": torch.poisson(torch.full(shape, 3.0)).double,
        "rate": torch.poisson(torch.full(shape, 3.0)).double,
    }[kind]()
    f = f.exp() if kind == "rate" else f
    return f, ((None, y, torch.rand(shape).double()) if kind == "variance" else (None, y))


def torchs(name, batch, reduction):
    _, function, options, _ = LOSSES[name]
    return lambda f: function(f, *batch[1:], reduction=reduction, **options)


def dense(product, f):
    n = f.numel()
    return product(torch.eye(n, dtype=f.dtype).view(n, *f.shape)).reshape(n, n)


def relative(A, B):
    return float((A - B).abs().max() / B.abs().max())


def cases(test):
    test = pytest.mark.parametrize("reduction", ["mean", "sum"])(test)
    test = pytest.mark.parametrize("shape", [(5, 3), (2, 2, 3)], ids=str)(test)
    return pytest.mark.parametrize("name", LOSSES)(test)


@cases
def test_value_gradient_and_hessian_are_those_of_torch(name, shape, reduction):
    ours, _, options, kind = LOSSES[name]
    f, batch = problem(kind, shape)
    loss, expected = ours(reduction=reduction, **options), torchs(name, batch, reduction)
    H = torch.autograd.functional.hessian(expected, f).view(f.numel(), -1)
    g = torch.func.grad(expected)(f)
    terms = loss.terms(f, batch)
    S = loss.root(f, batch)
    assert float(loss(f, batch)) == pytest.approx(float(expected(f)), rel=1e-12)
    assert relative(terms.weights * terms.gradients, g) < 1e-12
    assert relative(dense(loss.hessian(f, batch), f), H) < 1e-12
    assert relative(torch.diag(S.square().sum(0).flatten()), H) < 1e-12
    assert torch.equal(S * torch.eye(3).view(3, *[1] * (f.ndim - 1), 3), S)


@pytest.mark.parametrize("name", LOSSES)
def test_closed_forms_hold_in_float32(name):
    ours, _, options, kind = LOSSES[name]
    f, batch = problem(kind)
    expected = torchs(name, batch, "mean")
    H = torch.autograd.functional.hessian(expected, f).view(15, -1)
    single = (None, *(part.float() for part in batch[1:]))
    terms = ours(**options).terms(f.float(), single)
    product = ours(**options).hessian(f.float(), single)
    assert terms.gradients.dtype == torch.float32
    assert relative((terms.weights * terms.gradients).double(), torch.func.grad(expected)(f)) < 1e-5
    assert relative(dense(product, f.float()).double(), H) < 1e-5


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_outputs_of_one_axis_have_a_term_an_entry(name, reduction):
    ours, _, options, kind = LOSSES[name]
    options = {k: v for k, v in options.items() if not isinstance(v, torch.Tensor)}
    f, batch = problem(kind, (6,))
    loss = ours(reduction=reduction, **options)
    H = dense(loss.hessian(f, batch), f)
    S = loss.root(f, batch)
    assert loss.terms(f, batch).dims == ()
    assert S.shape == (1, 6)
    assert relative(torch.diag(S[0] ** 2), H) < 1e-12


@pytest.mark.parametrize(("reduction", "r"), [("mean", 1 / 15), ("sum", 1.0)])
def test_terms_sum_the_last_axis_and_weigh_one_entry_of_the_mean(reduction, r):
    f, batch = problem("real")
    G = 2 * (f - batch[1])
    outer = MeanSquaredError(reduction=reduction).terms(f, batch).outer()
    expected = torch.block_diag(*(r * torch.outer(g, g) for g in G))
    assert relative(dense(outer, f), expected) < 1e-12


@pytest.mark.parametrize("name", LOSSES)
def test_per_sample_losses_are_those_of_every_sample_alone(name):
    ours, _, options, kind = LOSSES[name]
    f, batch = problem(kind)
    for reduction in ("mean", "sum"):
        losses = ours(reduction=reduction, **options).per_sample(f, batch)
        for i, value in enumerate(losses):
            alone = (None, *(part[i : i + 1] for part in batch[1:]))
            expected = torchs(name, alone, reduction)(f[i : i + 1])
            assert float(value) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_ragged_batches_give_the_loss_of_the_whole(name, reduction):
    ours, _, options, kind = LOSSES[name]
    f, batch = problem(kind)
    loss = ours(reduction=reduction, **options)
    cuts = [slice(0, 2), slice(2, 3), slice(3, 5)]
    parts = [(f[cut], (None, *(part[cut] for part in batch[1:]))) for cut in cuts]
    counts = [loss.weighting.count(part) for _, part in parts]
    total = sum(counts) if loss.weighting.mean else 1.0
    mean = sum(c * loss(*part) for c, part in zip(counts, parts, strict=True)) / total
    assert float(mean) == pytest.approx(float(loss(f, batch)), rel=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_sampled_gradients_square_to_the_fisher_matrix_in_the_mean(name, reduction):
    # E over uniform numbers: Gauss-Legendre between the jumps of the quantile function for the
    # discrete ones, Gauss-Hermite in z = quantile(uniform) for the normal ones.
    ours, _, options, kind = LOSSES[name]
    f, batch = problem(kind)
    loss = ours(reduction=reduction, **options)
    E = torch.zeros_like(f)
    for uniform, probability in quadrature(kind, name, f, options):
        terms = loss.sampled(f, batch, lambda _, uniform=uniform: uniform)
        E += probability * terms.weights * terms.gradients.square()
    assert relative(torch.diag(E.flatten()), dense(loss.fisher(f, batch), f)) < 1e-12


def quadrature(kind, name, f, options):
    """Pairs of uniform numbers and weights, in the shape of f."""
    if kind in ("real", "variance"):
        z = math.sqrt(3)  # three nodes: exact for polynomials of degree five
        return [
            (torch.full_like(f, stats.norm.cdf(x)), w)
            for x, w in [(-z, 1 / 6), (0.0, 2 / 3), (z, 1 / 6)]
        ]
    if kind in ("binary", "share"):
        zero = (-f).sigmoid()
        return [(zero / 2, zero), ((1 + zero) / 2, 1 - zero)]
    rates = (f + options["eps"] if name == "poisson rate" else f.exp()).numpy()
    masses = [torch.tensor(stats.poisson.pmf(k, rates)) for k in range(90)]
    below = [torch.tensor(stats.poisson.cdf(k - 1, rates)) for k in range(90)]
    return [(b + p / 2, p) for b, p in zip(below, masses, strict=True)]


@pytest.mark.parametrize("name", [n for n in LIKELIHOODS if n != "poisson rate"])
def test_the_fisher_matrix_of_natural_parameters_is_the_hessian(name):
    ours, _, options, kind = LOSSES[name]
    f, batch = problem(kind)
    loss = ours(**options)
    u = torch.randn_like(f)
    assert relative(loss.fisher(f, batch)(u.clone()), loss.hvp(f, batch, u)) < 1e-12


def test_the_fisher_matrix_of_a_poisson_rate_does_not_see_the_counts():
    f, batch = problem("rate")
    product = PoissonRateNLL(reduction="sum", eps=0.0).fisher(f, batch)
    assert relative(product(torch.ones_like(f)), 1 / f) < 1e-12


@pytest.mark.parametrize("mean", [1e-3, 0.5, 4.0, 80.0, 1e4, 1e9])
def test_poisson_quantiles_are_those_of_scipy(mean):
    uniform = torch.linspace(0, 1, 203, dtype=torch.float64)[1:-1]
    ours = poisson_quantile(torch.full_like(uniform, mean), uniform)
    assert torch.equal(ours, torch.tensor(stats.poisson.ppf(uniform.numpy(), mean)))


@pytest.mark.parametrize("mean", [1e-3, 0.5, 4.0, 80.0, 1e4])
@pytest.mark.parametrize("tail", [1e-6, 1e-12])
def test_poisson_quantiles_are_right_in_the_tails(mean, tail):
    uniform = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = poisson_quantile(torch.full_like(uniform, mean), uniform).tolist()
    assert stats.poisson.cdf(low - 1, mean) < tail <= stats.poisson.cdf(low, mean)
    assert stats.poisson.sf(high, mean) < tail < stats.poisson.sf(high - 1, mean)


@pytest.mark.parametrize("shape", [(5, 3), (5, 1), (5,)], ids=str)
def test_variances_may_leave_out_the_last_axis(shape):
    f, y = torch.randn(2, 5, 3).double()
    v = torch.rand(shape).double() + 0.1
    expected = F.gaussian_nll_loss(f, y, v)
    assert float(GaussianNLL()(f, {"x": f, "y": y, "var": v})) == pytest.approx(float(expected))


def test_targets_of_another_dtype_are_converted():
    f = torch.randn(5, 3)
    y = torch.randint(0, 2, (5, 3))
    value = BinaryCrossEntropyWithLogits()(f, (None, y))
    assert torch.equal(value, bce(f, y.float()))


HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("narrow", "wide"), [(BRAIN, SINGLE), (HALF, SINGLE), (SINGLE, DOUBLE)], ids=str
)
@pytest.mark.parametrize("name", LOSSES)
def test_narrow_outputs_are_compared_with_wide_targets_without_rounding_these(name, narrow, wide):
    ours, _, options, kind = LOSSES[name]
    f, batch = problem(kind)
    f, batch = f.to(narrow), (None, *(part.to(wide) for part in batch[1:]))
    loss, expected = ours(**options), torchs(name, batch, "mean")
    value, exact = loss(f, batch), expected(f.to(wide))
    terms, S = loss.terms(f, batch), loss.root(f, batch)
    assert value.dtype == wide
    assert float(value) == pytest.approx(float(exact), rel=10 * torch.finfo(wide).eps)
    assert terms.gradients.dtype == S.dtype == loss.hvp(f, batch, f).dtype == narrow
    # The weight, the gradients, and their product: each is rounded once.
    g = torch.func.grad(expected)(f.to(wide))
    assert relative((terms.weights * terms.gradients).to(wide), g) < 2 * torch.finfo(narrow).eps


def test_gradients_of_narrow_outputs_are_those_of_torch():
    f, y = torch.randn(5, 3).bfloat16().requires_grad_(), torch.randn(5, 3)
    (ours,) = torch.autograd.grad(MeanSquaredError()(f, (None, y)), f)
    (expected,) = torch.autograd.grad(F.mse_loss(f, y), f)
    assert torch.equal(ours, expected)


def test_half_precision_outputs_have_a_mean_where_their_sum_overflows():
    f = torch.full((100, 10), 20.0, dtype=torch.float16)
    y = torch.zeros_like(f)
    assert float(MeanSquaredError()(f, (None, y))) == float(F.mse_loss(f, y)) == 400


@pytest.mark.parametrize("ask", ["__call__", "hessian", "terms", "root", "fisher"])
def test_negative_variances_are_refused(ask):
    batch = (None, torch.randn(5, 3), torch.linspace(-0.25, 1, 15).view(5, 3))
    with pytest.raises(DataError, match=r"variances of 0 or more, got -0.25; if .* logarithms"):
        getattr(GaussianNLL(), ask)(torch.randn(5, 3), batch)


def test_weights_are_copied():
    f, batch = problem("binary")
    w, rho = W.clone(), RHO.clone()
    loss = BinaryCrossEntropyWithLogits(weight=w, pos_weight=rho)
    before = loss.hvp(f, batch, f)
    w.mul_(1.1)
    rho.mul_(1.1)
    assert torch.equal(loss.hvp(f, batch, f), before)


def test_blocks_are_their_columns():
    f, batch = problem("binary")
    U = torch.randn(4, 5, 3).double()
    loss = BinaryCrossEntropyWithLogits(pos_weight=RHO)
    block = loss.hvp(f, batch, U)
    assert relative(block, torch.stack([loss.hvp(f, batch, u) for u in U])) < 1e-12


def test_targets_that_torch_would_broadcast_are_refused():
    message = r"outputs' shape \(5, 1\), got \(5,\), which torch would broadcast; reshape"
    with pytest.raises(LossShapeError, match=message):
        MeanSquaredError()(torch.randn(5, 1), (None, torch.randn(5)))
    with pytest.raises(LossShapeError, match=message):
        MeanSquaredError().hessian(torch.randn(5, 1), (None, torch.randn(5)))


def test_variances_of_another_shape_are_refused():
    with pytest.raises(LossShapeError, match=r"variances of .* \(5, 3\), .* got \(3,\); reshape"):
        GaussianNLL()(torch.randn(5, 3), (None, torch.randn(5, 3), torch.ones(3)))


@pytest.mark.parametrize("loss", [Huber(), SmoothL1()], ids=repr)
def test_what_is_no_likelihood_has_no_fisher_matrix(loss):
    f, batch = problem("real")
    for ask in (lambda: loss.fisher(f, batch), lambda: loss.sampled(f, batch, torch.rand)):
        with pytest.raises(OptionError, match="not the negative log-likelihood"):
            ask()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Huber(delta=0), "delta to be positive, got 0"),
        (lambda: SmoothL1(beta=-1.0), "beta to be positive, got -1.0"),
        (lambda: MeanSquaredError(reduction="none"), "reduction to be one of mean, sum"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(OptionError, match=message):
        make()
