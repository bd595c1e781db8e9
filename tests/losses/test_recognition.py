"""torch's losses are known by module and by function; every other callable goes by autograd."""

import functools
import operator
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchlinop.errors import DoubleBackwardError, LossShapeError, OptionError, WeightingError
from torchlinop.losses import (
    AutogradLoss,
    BinaryCrossEntropyWithLogits,
    CrossEntropy,
    GaussianNLL,
    Huber,
    MeanSquaredError,
    PoissonNLL,
    PoissonRateNLL,
    SmoothL1,
    WithHvp,
    criterion,
    loss_of_output,
)
from torchlinop.weighting import SUM, Weighting

WEIGHT = torch.tensor([0.3, 1.7, 1.0], dtype=torch.float64)
partial = functools.partial

# kind of targets, torch's module, its function with the same options, the loss here
TABLE = {
    "cross-entropy": ("labels", nn.CrossEntropyLoss(), F.cross_entropy, CrossEntropy),
    "cross-entropy with options": (
        "labels",
        nn.CrossEntropyLoss(WEIGHT, ignore_index=1, label_smoothing=0.1, reduction="sum"),
        partial(
            F.cross_entropy, weight=WEIGHT, ignore_index=1, label_smoothing=0.1, reduction="sum"
        ),
        CrossEntropy,
    ),
    "mse": ("real", nn.MSELoss(), F.mse_loss, MeanSquaredError),
    "mse sum": (
        "real",
        nn.MSELoss(reduction="sum"),
        partial(partial(F.mse_loss), reduction="sum"),
        MeanSquaredError,
    ),
    "bce": (
        "binary",
        nn.BCEWithLogitsLoss(WEIGHT, pos_weight=2 * WEIGHT),
        partial(F.binary_cross_entropy_with_logits, weight=WEIGHT, pos_weight=2 * WEIGHT),
        BinaryCrossEntropyWithLogits,
    ),
    "huber": ("real", nn.HuberLoss(delta=1.4), partial(F.huber_loss, delta=1.4), Huber),
    "smooth l1": ("real", nn.SmoothL1Loss(beta=2), partial(F.smooth_l1_loss, beta=2), SmoothL1),
    "poisson": (
        "count",
        nn.PoissonNLLLoss(full=True),
        partial(F.poisson_nll_loss, full=True),
        PoissonNLL,
    ),
    "poisson rate": (
        "count",
        nn.PoissonNLLLoss(log_input=False, eps=0.1),
        partial(F.poisson_nll_loss, log_input=False, eps=0.1),
        PoissonRateNLL,
    ),
    "gaussian": (
        "variance",
        nn.GaussianNLLLoss(full=True, eps=0.2),
        partial(F.gaussian_nll_loss, full=True, eps=0.2),
        GaussianNLL,
    ),
}


def problem(kind):
    f = torch.randn(5, 3, dtype=torch.float64).exp()
    targets = {
        "labels": (torch.randint(0, 3, (5,)),),
        "real": (torch.randn(5, 3).double(),),
        "binary": (torch.randint(0, 2, (5, 3)).double(),),
        "count": (torch.randint(0, 4, (5, 3)).double(),),
        "variance": (torch.randn(5, 3).double(), torch.rand(5, 3).double()),
    }[kind]
    return f, (None, *targets)


def relative(A, B):
    return float((A - B).abs().max() / B.abs().max())


def hessian_of(function, f):
    return torch.autograd.functional.hessian(function, f).view(f.numel(), -1)


def dense(product, f):
    n = f.numel()
    return product(torch.eye(n, dtype=f.dtype).view(n, *f.shape)).reshape(n, n)


@pytest.mark.parametrize("form", [1, 2], ids=["module", "function"])
@pytest.mark.parametrize("way", [loss_of_output, criterion])
@pytest.mark.parametrize("name", TABLE)
def test_losses_of_torch_are_recognised_with_their_options(name, way, form):
    kind, module, *_, ours = TABLE[name]
    f, batch = problem(kind)
    loss = way(TABLE[name][form])
    assert type(loss) is ours
    assert float(loss(f, batch)) == pytest.approx(float(module(f, *batch[1:])), rel=1e-12)
    H = hessian_of(lambda f: module(f, *batch[1:]), f)
    assert relative(dense(loss.hessian(f, batch), f), H) < 1e-12


@pytest.mark.parametrize("name", TABLE)
def test_a_module_inside_partial_is_recognised(name):
    kind, module, *_, ours = TABLE[name]
    f, batch = problem(kind)
    loss = loss_of_output(partial(module))
    assert type(loss) is ours
    assert float(loss(f, batch)) == pytest.approx(float(module(f, *batch[1:])), rel=1e-12)


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.CrossEntropyLoss(WEIGHT.clone()), "labels"),
        (nn.BCEWithLogitsLoss(WEIGHT.clone()), "binary"),
    ],
    ids=["cross-entropy", "bce"],
)
def test_later_changes_of_a_module_s_weights_do_not_reach_the_loss(module, kind):
    f, batch = problem(kind)
    loss = loss_of_output(module)
    before = loss.hvp(f, batch, f)
    module.weight[0] *= 2
    assert torch.equal(loss.hvp(f, batch, f), before)


class Doubled(nn.MSELoss):
    def forward(self, outputs, targets):
        return 2 * super().forward(outputs, targets)


class Same(nn.MSELoss):
    """A child that changes nothing."""


def test_children_that_override_forward_go_by_autograd():
    f, batch = problem("real")
    loss = loss_of_output(Doubled())
    assert type(loss) is AutogradLoss
    assert float(loss(f, batch)) == pytest.approx(2 * float(F.mse_loss(f, batch[1])))
    assert type(loss_of_output(Same())) is MeanSquaredError
    patched = nn.MSELoss()
    patched.forward = lambda outputs, targets: outputs.sum()
    assert type(loss_of_output(patched)) is AutogradLoss


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        (F.l1_loss, "real"),
        (nn.KLDivLoss(reduction="batchmean"), "binary"),
        (partial(F.gaussian_nll_loss, var=torch.ones(5, 3)), "real"),
        (partial(F.cross_entropy, size_average=None), "labels"),
    ],
    ids=["function", "module", "unknown option", "legacy option"],
)
def test_other_losses_of_torch_are_criteria_of_the_targets(loss, kind):
    f, batch = problem(kind)
    ours = loss_of_output(loss)
    assert type(ours) is AutogradLoss
    assert float(ours(f, batch)) == pytest.approx(float(loss(f, batch[1])), rel=1e-12)


def test_a_loss_of_output_is_left_as_it_is():
    loss = CrossEntropy(class_axis=-1)
    assert loss_of_output(loss) is loss
    assert criterion(loss) is loss


@pytest.mark.parametrize("loss", [nn.MSELoss(reduction="none"), nn.NLLLoss(reduction="none")])
def test_an_unreduced_module_is_refused(loss):
    with pytest.raises(OptionError, match=r'a scalar, got .* with reduction="none"; pass'):
        loss_of_output(loss)


def test_an_unreduced_function_is_refused():
    with pytest.raises(OptionError, match='with reduction="none"'):
        loss_of_output(partial(F.cross_entropy, reduction="none"))


@pytest.mark.parametrize("way", [loss_of_output, criterion])
def test_what_cannot_be_called_is_refused(way):
    with pytest.raises(OptionError, match="a loss that can be called, got a str; pass"):
        way("cross_entropy")


def quartic(outputs, batch):
    """Σ_i ω_i (|f_i|⁴ + ⟨f_i, y_i⟩), coupled within a sample."""
    return (outputs.square().sum(1).square() + (outputs * batch[1]).sum(1)).mean()


def quartic_hessian(f):
    # ∇²|x|⁴ = 8 x xᵀ + 4 |x|² I
    return torch.block_diag(
        *(8 * torch.outer(x, x) + 4 * (x @ x) * torch.eye(3, dtype=x.dtype) for x in f)
    ) / len(f)


COUNT = Weighting(lambda batch: len(batch[1]), "samples")


def test_any_callable_gets_its_hessian_root_and_terms_by_autograd():
    f, batch = problem("real")
    loss = loss_of_output(quartic).with_weighting(COUNT)
    S = loss.root(f, batch)
    terms = loss.terms(f, batch)
    same = torch.arange(5).repeat_interleave(3)
    within = same[:, None] == same
    assert relative(dense(loss.hessian(f, batch), f), quartic_hessian(f)) < 1e-12
    assert relative(S.flatten(1).T @ S.flatten(1) * within, quartic_hessian(f)) < 1e-12
    expected = 4 * f.square().sum(1, keepdim=True) * f + batch[1]
    assert relative(terms.gradients, expected) < 1e-12
    assert relative(terms.weights, torch.full((5, 1), 0.2, dtype=f.dtype)) < 1e-12
    assert terms.dims == (-1,)


def test_a_sum_weighs_every_sample_with_one():
    f, batch = problem("real")
    loss = AutogradLoss(lambda f, b: len(f) * quartic(f, b), SUM)
    assert torch.equal(loss.terms(f, batch).weights, torch.ones(5, 1).double())


def test_samples_that_count_nothing_have_no_gradient():
    f, batch = problem("labels")
    batch = (torch.zeros(5), batch[1].index_fill(0, torch.tensor([0, 3]), -100))
    count = Weighting(lambda b: float((b[1] != -100).sum()), "unmasked labels")
    loss = AutogradLoss(lambda f, b: F.cross_entropy(f, b[1]), count)
    exact = CrossEntropy().terms(f, batch)
    assert relative(loss.terms(f, batch).gradients, exact.gradients) < 1e-12
    assert relative(loss.terms(f, batch).weights, exact.weights) < 1e-12


def test_a_product_falls_back_to_columns_where_there_is_no_batching_rule():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return Square.apply(x, g)

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, g):
            ctx.save_for_backward(x, g)
            return 3 * x.square() * g

        @staticmethod
        def backward(ctx, v):
            x, g = ctx.saved_tensors
            v.data_ptr()  # which batched tensors do not have
            return 6 * x * g * v, 3 * x.square() * v

    f, batch = problem("real")
    loss = AutogradLoss(lambda f, b: Cube.apply(f).sum())
    assert relative(dense(loss.hessian(f, batch), f), torch.diag(6 * f.flatten())) < 1e-12


def test_a_loss_linear_in_the_outputs_has_no_hessian():
    f, batch = problem("real")
    loss = AutogradLoss(lambda f, b: (f * b[1]).sum())
    assert torch.equal(dense(loss.hessian(f, batch), f), torch.zeros(15, 15).double())


class OwnProduct:
    """|f|² with a product of its own that knows no leading axes and overwrites u."""

    def __call__(self, outputs, batch):
        return outputs.square().sum()

    def hvp(self, outputs, batch, u):
        assert u.shape == outputs.shape
        return u.mul_(2)


def test_an_object_with_hvp_is_asked_for_its_products():
    f, batch = problem("real")
    loss = loss_of_output(OwnProduct())
    U = torch.randn(4, 5, 3).double()
    assert type(loss) is WithHvp
    assert relative(loss.hvp(f, batch, U), 2 * U) < 1e-12
    assert relative(loss.hvp(f, batch, U[0]), 2 * U[0]) < 1e-12
    assert type(loss.with_weighting(SUM)) is WithHvp
    assert relative(loss.with_weighting(SUM).terms(f, batch).gradients, 2 * f) < 1e-12


def contrastive(outputs, batch):
    return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))


@pytest.mark.parametrize("ask", ["terms", "root"])
def test_a_loss_that_mixes_samples_has_no_per_sample_matrix(ask):
    f, batch = problem("real")
    loss = AutogradLoss(contrastive, COUNT)
    with pytest.raises(
        WeightingError, match=r"mixes samples: .* a per-sample matrix is not defined"
    ):
        getattr(loss, ask)(f, batch)


def test_terms_need_a_weighting():
    f, batch = problem("real")
    with pytest.raises(WeightingError, match=r"whose weights are known, got .* give the loss a"):
        AutogradLoss(quartic).terms(f, batch)
    with pytest.raises(WeightingError, match="10 rows of outputs for 5 samples"):
        AutogradLoss(quartic, SUM).terms(torch.cat([f, f]), batch)


def test_an_indefinite_loss_has_no_root():
    f, batch = problem("real")
    with pytest.raises(OptionError, match=r"not convex in the outputs .an eigenvalue is -2"):
        AutogradLoss(lambda f, b: f[:, 0].square().sum() - f[:, 1].square().sum()).root(f, batch)


def test_a_loss_of_no_known_distribution_has_no_fisher_matrix():
    f, batch = problem("real")
    with pytest.raises(OptionError, match="not the negative log-likelihood"):
        AutogradLoss(quartic).fisher(f, batch)


def test_a_loss_that_gives_no_scalar_is_refused():
    with pytest.raises(LossShapeError, match=r"shape \(5, 3\), expected a scalar"):
        AutogradLoss(lambda f, b: f)(*problem("real"))


def test_a_loss_without_second_derivative_is_refused():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square().sum()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 2 * g * ctx.saved_tensors[0]

    f, batch = problem("real")
    with pytest.raises(DoubleBackwardError, match=r"has no second derivative .* write it with"):
        AutogradLoss(lambda f, b: Once.apply(f)).hessian(f, batch)
    log_p = f.float().log_softmax(1)[:, None].expand(5, 5, 3)
    targets = torch.tensor([[1, 2]] * 5)
    ctc = AutogradLoss(lambda f, b: F.ctc_loss(f, targets, (5,) * 5, (2,) * 5))
    with pytest.raises(DoubleBackwardError, match="has no second derivative"):
        ctc.hvp(log_p, batch, log_p)


def test_other_errors_of_a_loss_are_its_own():
    with pytest.raises(RuntimeError, match="size of tensor"):
        AutogradLoss(lambda f, b: operator.add(f, torch.ones(4)).sum()).hessian(*problem("real"))


@pytest.mark.parametrize("way", [loss_of_output, criterion])
@pytest.mark.parametrize(
    ("loss", "names"),
    [
        (nn.CosineEmbeddingLoss(), "input1, input2, target"),
        (nn.TripletMarginLoss(), "anchor, positive, negative"),
        (nn.CTCLoss(), "log_probs, targets, input_lengths, target_lengths"),
        (F.margin_ranking_loss, "input1, input2, target"),
        (lambda outputs, targets, mask: outputs.sum(), "outputs, targets, mask"),
    ],
)
def test_losses_of_three_arguments_are_refused(way, loss, names):
    with pytest.raises(OptionError, match=rf"which takes \({names}\); give loss_of_output_fn a"):
        way(loss)


class Focal(nn.Module):
    """(1 - p)² times the cross-entropy, of outputs and targets."""

    def forward(self, o, t):
        losses = F.cross_entropy(o, t, reduction="none")
        return ((1 - (-losses).exp()).square() * losses).mean()


@pytest.mark.parametrize("loss", [Focal(), lambda o, t: (o - t).mean(), lambda o, t: t.long()])
def test_a_criterion_given_as_a_loss_of_output_is_told_from_one(loss):
    f, batch = problem("labels")
    message = r"a loss of \(outputs, batch\), but .* failed .* pass supervised_loss_of_output of it"
    with pytest.raises(OptionError, match=message):
        loss_of_output(loss)(f, batch)


@pytest.mark.parametrize(
    ("product", "came"),
    [(lambda u: u[0], r"\(3,\)"), (lambda u: None, "NoneType")],
    ids=["shape", "None"],
)
def test_a_product_of_another_shape_is_refused(product, came):
    class Wrong(OwnProduct):
        def hvp(self, outputs, batch, u):
            return product(u)

    f, batch = problem("real")
    message = rf"hvp\(outputs, batch, u\) of .* to give the shape \(5, 3\) .* got {came}; reshape"
    with pytest.raises(LossShapeError, match=message):
        loss_of_output(Wrong()).hvp(f, batch, f)


class Remembering(nn.Module):
    """Divides by a running norm of the outputs, counts its calls, and turns itself to eval."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3, affine=False, dtype=torch.float64)
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.calls = []

    def forward(self, outputs, targets):
        targets = targets[1] if isinstance(targets, tuple) else targets
        self.scale += outputs.detach().norm()
        self.calls.append(len(outputs))
        loss = (self.norm(outputs) - targets).square().mean() / self.scale
        self.norm.eval()
        return loss

    def hvp(self, outputs, batch, u):
        self.scale += 1
        return self.scale * u


@pytest.mark.parametrize("way", [loss_of_output, criterion])
def test_a_module_with_a_state_is_the_same_at_every_call_and_left_as_it_was(way):
    f, batch = problem("real")
    module = Remembering()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    loss = way(module)
    first, again = loss(f, batch), loss(f, batch)
    products = loss.hvp(f, batch, f), loss.hvp(f, batch, f)
    assert torch.equal(first, again)
    assert torch.equal(*products)
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())
    assert module.norm.training
    assert module.calls == []
    assert float(first) == pytest.approx(float(module(f, batch[1])), rel=1e-13)


@pytest.mark.parametrize(
    "loss",
    [nn.CrossEntropyLoss(WEIGHT), nn.HuberLoss(), nn.L1Loss(), quartic],
    ids=["CrossEntropyLoss", "HuberLoss", "L1Loss", "quartic"],
)
def test_losses_can_be_pickled(loss):
    kind = "labels" if isinstance(loss, nn.CrossEntropyLoss) else "real"
    f, batch = problem(kind)
    ours = loss_of_output(loss)
    assert float(pickle.loads(pickle.dumps(ours))(f, batch)) == float(ours(f, batch))
