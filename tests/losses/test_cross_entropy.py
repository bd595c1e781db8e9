"""Cross-entropy's closed forms are the derivatives of torch's own, whatever the targets."""

import functools

import pytest
import torch
import torch.nn.functional as F

from torchlinop.errors import DataError, LossShapeError, OptionError
from torchlinop.losses import CrossEntropy

WEIGHT = torch.tensor([0.3, 1.7, 1.0, 2.2], dtype=torch.float64)
SHAPES = {"rows": (5, 4), "one axis more": (5, 4, 2), "an image": (3, 4, 2, 2)}
TARGETS = {
    "labels": ("hard", {}),
    "masked labels": ("masked", {}),
    "another ignore_index": ("hard", {"ignore_index": 2}),
    "class weights": ("masked", {"weight": WEIGHT}),
    "smoothing": ("masked", {"label_smoothing": 0.2}),
    "weights and smoothing": ("masked", {"weight": WEIGHT, "label_smoothing": 0.2}),
    "probabilities": ("soft", {}),
    "all with probabilities": ("soft", {"weight": WEIGHT, "label_smoothing": 0.2}),
}


def problem(shape, targets):
    outputs = torch.randn(shape, dtype=torch.float64)
    rows = (shape[0], *shape[2:])
    labels = torch.randint(0, shape[1], rows)
    if targets == "soft":
        return outputs, torch.randn(shape, dtype=torch.float64).softmax(1)
    if targets == "masked":
        labels.view(-1)[::3] = -100
    return outputs, labels


def cases(test):
    test = pytest.mark.parametrize("reduction", ["mean", "sum"])(test)
    test = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)(test)
    return pytest.mark.parametrize(("targets", "options"), TARGETS.values(), ids=TARGETS)(test)


def dense(product, outputs):
    """The matrix of a map of outputs, column by column in one block."""
    n = outputs.numel()
    units = torch.eye(n, dtype=outputs.dtype).view(n, *outputs.shape)
    return product(units).reshape(n, n)


def dense_hessian(outputs, y, **options):
    n = outputs.numel()
    loss = functools.partial(F.cross_entropy, target=y, **options)
    return torch.autograd.functional.hessian(loss, outputs).view(n, n)


def blocks(S, axis):
    """``Σ_c S_c S_cᵀ`` of every term, as one block-diagonal matrix."""
    rows = S[0].numel() // S.shape[axis]
    term = torch.arange(rows).view(
        [1 if n == axis % S.ndim else m for n, m in enumerate(S.shape)][1:]
    )
    term = term.expand(S.shape[1:]).flatten()
    columns = S.flatten(1)
    return columns.T @ columns * (term[:, None] == term)


def relative(A, B):
    return float((A - B).abs().max() / B.abs().max())


@cases
def test_the_loss_is_that_of_torch(targets, options, shape, reduction):
    f, y = problem(shape, targets)
    value = CrossEntropy(reduction=reduction, **options)(f, (None, y))
    expected = F.cross_entropy(f, y, reduction=reduction, **options)
    assert float(value) == pytest.approx(float(expected), rel=1e-13)


@cases
def test_hessian_fisher_and_root_are_the_dense_hessian(targets, options, shape, reduction):
    f, y = problem(shape, targets)
    loss = CrossEntropy(reduction=reduction, **options)
    H = dense_hessian(f, y, reduction=reduction, **options)
    assert relative(dense(loss.hessian(f, (None, y)), f), H) < 1e-12
    assert relative(dense(loss.fisher(f, (None, y)), f), H) < 1e-12
    assert relative(blocks(loss.root(f, (None, y)), axis=2), H) < 1e-12


@cases
def test_weighted_gradients_of_the_terms_are_the_gradient(targets, options, shape, reduction):
    f, y = problem(shape, targets)
    terms = CrossEntropy(reduction=reduction, **options).terms(f, (None, y))
    f.requires_grad_()
    F.cross_entropy(f, y, reduction=reduction, **options).backward()
    assert relative(terms.weights * terms.gradients, f.grad) < 1e-12
    assert terms.dims == (1 - f.ndim,)


@cases
def test_the_fisher_matrix_is_the_expectation_of_sampled_outer_products(
    targets, options, shape, reduction
):
    # Numbers in the middle of the class's interval draw class c in every term; its products are
    # weighted with its probability.
    f, y = problem(shape, targets)
    loss = CrossEntropy(reduction=reduction, **options)
    P = f.softmax(1)
    middle = P.cumsum(1) - P / 2
    E = torch.zeros(f.numel(), f.numel(), dtype=f.dtype)
    for c in range(shape[1]):
        terms = loss.sampled(f, (None, y), lambda _, c=c: middle[:, c])
        probability = P[:, c : c + 1].expand(f.shape).reshape(-1, 1)
        E += probability * dense(terms.outer(), f).T
    assert relative(E, dense_hessian(f, y, reduction=reduction, **options)) < 1e-12


@cases
def test_per_sample_losses_are_those_of_every_sample_alone(targets, options, shape, reduction):
    f, y = problem(shape, targets)
    losses = CrossEntropy(reduction=reduction, **options).per_sample(f, (None, y))
    alone = [
        F.cross_entropy(f[i : i + 1], y[i : i + 1], reduction=reduction, **options)
        for i in range(len(f))
    ]
    assert torch.allclose(losses, torch.stack(alone).nan_to_num(), rtol=1e-13)


@cases
def test_weights_of_ragged_batches_give_the_loss_of_the_whole(targets, options, shape, reduction):
    f, y = problem(shape, targets)
    loss = CrossEntropy(reduction=reduction, **options)
    parts = list(zip(f.split([2, 1, len(f) - 3]), y.split([2, 1, len(f) - 3]), strict=True))
    counts = [loss.weighting.count((None, part)) for _, part in parts]
    values = [loss(part, (None, target)).nan_to_num() for part, target in parts]
    total = sum(counts) if loss.weighting.mean else 1.0
    mean = sum(c * v for c, v in zip(counts, values, strict=True)) / total
    assert float(mean) == pytest.approx(float(loss(f, (None, y))), rel=1e-12)


@pytest.mark.parametrize(("targets", "options"), TARGETS.values(), ids=TARGETS)
def test_closed_forms_hold_in_float32(targets, options):
    f, y = problem((5, 4, 2), targets)
    H = dense_hessian(f, y, **options)
    single = y.float() if y.is_floating_point() else y
    loss, f = CrossEntropy(**options), f.float()
    S = loss.root(f, (None, single))
    assert loss.weighting.mean
    assert relative(dense(loss.hessian(f, (None, single)), f).double(), H) < 1e-5
    assert relative(blocks(S, axis=2).double(), H) < 1e-5
    assert S.dtype == torch.float32


def test_gradient_terms_are_those_of_the_unreduced_loss():
    f, y = problem((5, 4), "masked")
    terms = CrossEntropy(weight=WEIGHT).terms(f, (None, y))
    f.requires_grad_()
    F.cross_entropy(f, y, weight=WEIGHT, reduction="sum").backward()
    assert relative(terms.gradients, f.grad) < 1e-12
    counted = y != -100
    expected = counted / WEIGHT[y[counted]].sum()
    assert relative(terms.weights[:, 0], expected) < 1e-12


def test_classes_on_the_last_axis_are_those_of_language_models():
    f, y = problem((3, 4, 2), "masked")
    torchs, last = CrossEntropy(), CrossEntropy(class_axis=-1)
    u = torch.randn(2, *f.shape, dtype=f.dtype)
    logits = f.movedim(1, -1).contiguous()
    assert float(last(logits, (None, y))) == pytest.approx(float(torchs(f, (None, y))), rel=1e-13)
    product = last.hvp(logits, (None, y), u.movedim(2, -1))
    assert relative(product.movedim(-1, 2), torchs.hvp(f, (None, y), u)) < 1e-12
    assert last.root(logits, (None, y)).shape == (4, 3, 2, 4)
    assert last.terms(logits, (None, y)).dims == (-1,)


@pytest.mark.parametrize("fused", ["auto", "eager"])
def test_a_block_is_its_columns_and_hvp_leaves_u_alone(fused):
    f, y = problem((5, 4, 2), "masked")
    loss = CrossEntropy(fused=fused)
    U = torch.randn(3, *f.shape, dtype=f.dtype)
    before = U.clone()
    block = loss.hvp(f, (None, y), U)
    columns = torch.stack([loss.hvp(f, (None, y), u) for u in U])
    assert relative(block, columns) < 1e-12
    assert torch.equal(U, before)


def test_a_batch_without_labels_has_zero_derivatives_not_nan():
    f = torch.randn(3, 4)
    batch = (None, torch.full((3,), -100))
    loss = CrossEntropy()
    terms = loss.terms(f, batch)
    assert loss.weighting.count(batch) == 0
    for zero in (loss.hvp(f, batch, f), loss.root(f, batch), terms.gradients, terms.weights):
        assert torch.equal(zero, torch.zeros_like(zero))


def test_classes_of_probability_zero_give_no_nan_and_are_never_drawn():
    f = torch.randn(4, 5, dtype=torch.float64)
    f[:, [0, 4]] = -torch.inf
    batch = (None, torch.tensor([1, 2, 3, 1]))
    loss = CrossEntropy()
    for height in (0.0, 1e-300, 0.5, 1.0):
        drawn = loss.sampled(f, batch, lambda s, h=height: torch.full(s, h, dtype=f.dtype))
        assert torch.equal(drawn.gradients[:, [0, 4]], torch.zeros(4, 2).double())
    assert torch.isfinite(loss.hvp(f, batch, torch.ones_like(f))).all()
    assert torch.isfinite(loss.root(f, batch)).all()
    assert torch.isfinite(loss.terms(f, batch).gradients).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_reduced_in_float32(dtype):
    f, y = problem((6, 4), "masked")
    f = f.to(dtype)
    value = CrossEntropy()(f, (None, y))
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(F.cross_entropy(f.double(), y)), rel=1e-5)
    terms = CrossEntropy().terms(f, (None, y))
    exact = CrossEntropy().terms(f.double(), (None, y))
    assert terms.gradients.dtype == dtype
    # Rounded once, and a few times in float32.
    assert relative(terms.gradients.double(), exact.gradients) < 1e-6 + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_labels_may_be_of_any_integer_type(dtype):
    f, y = problem((5, 4), "hard")
    value = CrossEntropy()(f, (None, y.to(dtype)))
    assert float(value) == pytest.approx(float(F.cross_entropy(f, y)), rel=1e-13)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "none"}, 'reduction to be one of mean, sum, got .none.; .*"mean"'),
        ({"class_axis": 2}, "class_axis to be 1 .as in torch. or -1, got 2"),
        ({"label_smoothing": 1.5}, "label_smoothing between 0 and 1, got 1.5"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        CrossEntropy(**options)


@pytest.mark.parametrize(
    ("f", "y", "message"),
    [
        ((5, 4), torch.zeros(4).long(), r"labels of shape \(5,\) for outputs .*, got \(4,\)"),
        ((5, 4), torch.zeros(5, 3), r"probabilities of shape \(5, 4\) .*, got \(5, 3\)"),
        ((2, 7, 4), torch.zeros(2, 7).long(), r"got \(2, 7\); .* class_axis=-1 if"),
        ((4,), torch.tensor(1), r"a sample axis and a class axis, got shape \(4,\)"),
        (
            (5, 4),
            torch.ones(5),
            r"integer labels, or .* shape \(5,\); pass labels.long",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(f, y, message):
    with pytest.raises(LossShapeError, match=message):
        CrossEntropy()(torch.randn(f), (None, y))
    with pytest.raises(LossShapeError, match=message):
        CrossEntropy().hessian(torch.randn(f), (None, y))


ASKED = ["__call__", "per_sample", "hessian", "terms", "root", "fisher"]


@pytest.mark.parametrize("label", [-1, 4, 7])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])
@pytest.mark.parametrize("ask", ASKED)
def test_labels_that_are_no_classes_are_refused(ask, weight, label):
    y = torch.tensor([0, -100, 3, label, 1])
    message = rf"labels from 0 to 3, or -100 where there is none, got {label}; correct the labels"
    with pytest.raises(DataError, match=message):
        getattr(CrossEntropy(weight=weight), ask)(torch.randn(5, 4), (None, y))


@pytest.mark.parametrize(
    ("weight", "label", "message"),
    [
        (None, -1, "labels of 0 or more, or -100 where there is none, got -1; correct"),
        (WEIGHT, -1, "labels from 0 to 3, or -100 .* got -1"),
        (WEIGHT, 7, "labels from 0 to 3, or -100 .* got 7"),
    ],
)
def test_labels_that_are_no_classes_are_refused_where_batches_are_counted(weight, label, message):
    with pytest.raises(DataError, match=message):
        CrossEntropy(weight=weight).weighting.count((None, torch.tensor([0, label])))


def test_a_negative_label_may_be_the_one_that_is_ignored():
    f, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, -1, 3, -1, 1])
    value = CrossEntropy(ignore_index=-1)(f, (None, y))
    assert float(value) == pytest.approx(float(F.cross_entropy(f, y, ignore_index=-1)), rel=1e-13)


@pytest.mark.parametrize("targets", ["hard", "soft"])
@pytest.mark.parametrize("ask", ASKED)
def test_class_weights_of_another_number_are_refused(ask, targets):
    f, y = problem((5, 4), targets)
    message = r"a class weight for each of 4 classes, got weights of shape \(3,\); pass as many"
    with pytest.raises(LossShapeError, match=message):
        getattr(CrossEntropy(weight=WEIGHT[:3]), ask)(f, (None, y))


def test_float_labels_are_refused_where_batches_are_counted():
    with pytest.raises(LossShapeError, match=r"integer labels, .* shape \(5,\); pass labels.long"):
        CrossEntropy().weighting.count((None, torch.ones(5)))


def test_losses_of_samples_are_taken_together_by_vmap():
    # Values cannot be asked for there, so labels go unchecked.
    f, y = problem((5, 4), "hard")
    loss = CrossEntropy(weight=WEIGHT)
    together = torch.func.vmap(lambda f, y: loss(f[None], (None, y[None])))(f, y)
    assert relative(together, loss.per_sample(f, (None, y))) < 1e-13


def test_class_weights_are_copied():
    f, y = problem((5, 4), "hard")
    weight = WEIGHT.clone()
    loss = CrossEntropy(weight=weight)
    before = loss.hvp(f, (None, y), f)
    weight[0] *= 2
    assert torch.equal(loss.hvp(f, (None, y), f), before)
