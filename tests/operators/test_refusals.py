"""What matrices of outputs and of samples refuse, in a sentence, and the model as it was."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchlinop
from torchlinop import (
    EmpiricalFisherOperator,
    FisherOperator,
    GGNOperator,
    GradientCovarianceOperator,
    HessianOperator,
    JacobianOperator,
)
from torchlinop.errors import (
    BatchError,
    DoubleBackwardError,
    LossShapeError,
    NoParametersError,
    OptionError,
    SampleMixingError,
    WeightingError,
)
from torchlinop.losses import supervised_forward

EVERY = [GGNOperator, FisherOperator, EmpiricalFisherOperator, GradientCovarianceOperator]
PER_SAMPLE = [EmpiricalFisherOperator, GradientCovarianceOperator]


def forward(model, batch):
    return model(batch[0])


def mlp(norm=None):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 5), *([norm] if norm else []), nn.Tanh(), nn.Linear(5, 3)]
    return nn.Sequential(*layers).double()


def batch(samples=4):
    torch.manual_seed(1)
    return torch.randn(samples, 6).double(), torch.randint(0, 3, (samples,))


def contrastive(outputs, batch):
    z = F.normalize(outputs)
    return F.cross_entropy(z @ z.T / 0.1, torch.arange(len(z)) // 2)


@pytest.mark.parametrize("operator", EVERY)
@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda model, batch: (model(batch[0]), 1), "forward_fn returned tuple, expected one"),
        (lambda model, batch: model(batch[0]).argmax(1), "forward_fn returned torch.int64"),
    ],
)
def test_outputs_that_are_no_tensor_of_numbers_are_refused(operator, outputs, message):
    with pytest.raises(LossShapeError, match=message):
        operator(mlp(), [batch()], outputs, nn.CrossEntropyLoss())


@pytest.mark.parametrize("operator", EVERY)
def test_a_batch_whose_targets_have_no_known_name_is_refused(operator):
    x, y = batch()
    message = r"could not tell inputs from targets in a dict with keys \{a, b\}\. Give loss_fn"
    with pytest.raises(BatchError, match=message):
        operator(mlp(), [{"a": x, "b": y}], lambda m, b: m(b["a"]), nn.CrossEntropyLoss())


@pytest.mark.parametrize("operator", EVERY)
def test_targets_that_do_not_fit_the_outputs_are_refused_before_any_product(operator):
    x, y = batch()
    with pytest.raises(LossShapeError, match=r"expected labels of shape \(4,\) for outputs"):
        operator(mlp(), [(x, y[:, None])], forward, nn.CrossEntropyLoss())


@pytest.mark.parametrize("operator", [GGNOperator, EmpiricalFisherOperator])
def test_a_loss_of_outputs_that_is_no_scalar_is_refused_before_any_product(operator):
    with pytest.raises(LossShapeError, match=r"loss_fn returned shape \(4, 3\), expected a scalar"):
        operator(mlp(), [batch()], forward, lambda outputs, batch: outputs)


@pytest.mark.parametrize("operator", [HessianOperator, *EVERY, JacobianOperator])
def test_an_unknown_option_is_named_with_its_neighbours(operator):
    parts = {HessianOperator: [contrastive], JacobianOperator: [forward]}
    arguments = parts.get(operator, [forward, nn.CrossEntropyLoss()])
    with pytest.raises(OptionError, match="unknown option 'colum_chunk'; did you mean .*column_ch"):
        operator(mlp(), [batch()], *arguments, colum_chunk=3)


def test_an_unknown_way_to_differentiate_the_loss_lists_the_choices():
    with pytest.raises(OptionError, match="unknown loss_hvp 'fast'; choose one of analytical, aut"):
        GGNOperator(mlp(), [batch()], forward, nn.CrossEntropyLoss(), loss_hvp="fast")


@pytest.mark.parametrize("samples", [0, 1.5])
def test_a_number_of_draws_below_one_is_refused(samples):
    with pytest.raises(OptionError, match="expected mc_samples to be an integer of at least 1"):
        FisherOperator(mlp(), [batch()], forward, nn.CrossEntropyLoss(), mc_samples=samples)


@pytest.mark.parametrize("loss", [nn.HuberLoss(), contrastive], ids=["huber", "function"])
def test_a_loss_that_is_no_likelihood_has_no_fisher_matrix(loss):
    with pytest.raises(OptionError, match="not the negative log-likelihood of a distribution"):
        FisherOperator(mlp(), [batch()], forward, loss)


@pytest.mark.parametrize("operator", PER_SAMPLE)
def test_batch_statistics_are_refused_where_samples_count_alone(operator):
    with pytest.raises(SampleMixingError, match="BatchNorm 1 uses the batch in train mode"):
        operator(mlp(nn.BatchNorm1d(5)), [batch()], forward, nn.CrossEntropyLoss(), mode="train")


def test_batch_statistics_are_refused_where_targets_are_drawn():
    model = mlp(nn.BatchNorm1d(5))
    with pytest.raises(SampleMixingError, match="BatchNorm 1 uses the batch in train mode"):
        FisherOperator(model, [batch()], forward, nn.CrossEntropyLoss(), mode="train", mc_samples=1)


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


@pytest.mark.parametrize("operator", PER_SAMPLE)
@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (Centred(), "a sample alone has other outputs than in its batch"),
        (nn.BatchNorm1d(5, track_running_stats=False), "a sample alone cannot be evaluated"),
    ],
    ids=["centred", "no running statistics"],
)
def test_samples_that_depend_on_each_other_are_refused_by_measurement(operator, norm, message):
    with pytest.raises(SampleMixingError, match=message):
        operator(mlp(norm), [batch()], forward, nn.CrossEntropyLoss())


@pytest.mark.parametrize("sizes", [[4], [4, 4]], ids=["one batch", "two batches"])
@pytest.mark.parametrize("arguments", [(forward, contrastive), ()], ids=["of outputs", "of model"])
def test_a_loss_that_mixes_samples_has_no_empirical_fisher(sizes, arguments):
    arguments = arguments or (lambda model, batch: contrastive(model(batch[0]), batch),)
    with pytest.raises(SampleMixingError, match="expected a loss that does not mix samples"):
        EmpiricalFisherOperator(mlp(), [batch(size) for size in sizes], *arguments)


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * 2 * x / x.numel()


def test_a_loss_without_second_derivative_is_refused():
    G = GGNOperator(mlp(), [batch()], forward, lambda f, batch: OnceDifferentiable.apply(f))
    with pytest.raises(DoubleBackwardError, match="the loss .* has no second derivative"):
        G @ torch.ones(G.size, dtype=G.dtype)


def test_a_custom_loss_whose_batches_have_unknown_weights_is_refused():
    class_weights = torch.tensor([1.0, 2.0, 5.0]).double()

    def loss(outputs, batch):
        return F.cross_entropy(outputs, batch[1], weight=class_weights)

    with pytest.raises(WeightingError, match="no count explains the loss of their parts"):
        GGNOperator(mlp(), [batch(4), batch(3)], forward, loss)


class WithEmbedding(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4, **options)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(torch.tanh(self.embed(tokens)))


def tokens():
    return torch.tensor([0, 3, 3, 6, 1]), torch.tensor([0, 2, 1, 1, 0])


def test_sparse_embeddings_have_the_same_matrix_as_dense_ones():
    for operator in (GGNOperator, FisherOperator, EmpiricalFisherOperator):
        arguments = ([tokens()], forward, nn.CrossEntropyLoss())
        sparse = operator(WithEmbedding(sparse=True).double(), *arguments).to_dense()
        dense = operator(WithEmbedding().double(), *arguments).to_dense()
        torch.testing.assert_close(sparse, dense, rtol=0, atol=0)


def test_a_sparse_embedding_is_given_back_sparse():
    model = WithEmbedding(sparse=True)
    GGNOperator(model, [tokens()], forward, nn.CrossEntropyLoss()).to_dense()
    assert model.embed.sparse


def test_a_sparse_gradient_of_a_function_is_refused():
    model = WithEmbedding()

    def sparse_forward(model, batch):
        return model.head(F.embedding(batch[0], model.embed.weight, sparse=True))

    with pytest.raises(DoubleBackwardError, match="sparse gradient, .* call it with sparse=False"):
        GGNOperator(model, [tokens()], sparse_forward, nn.CrossEntropyLoss()).to_dense()


def test_an_embedding_that_renormalises_itself_is_refused():
    with pytest.raises(OptionError, match="Embedding with max_norm changes its own weight"):
        GGNOperator(WithEmbedding(max_norm=1.0), [tokens()], forward, nn.CrossEntropyLoss())


def test_a_model_without_parameters_is_refused():
    with pytest.raises(NoParametersError, match=r"no parameters \(quantised layers hold none\)"):
        GGNOperator(nn.Sequential(nn.ReLU()), [batch()], forward, nn.CrossEntropyLoss())


def test_integer_parameters_are_left_alone():
    model = mlp()
    n = sum(p.numel() for p in model.parameters())
    model.register_parameter("step", nn.Parameter(torch.tensor([3]), requires_grad=False))
    assert GGNOperator(model, [batch()], forward, nn.CrossEntropyLoss()).size == n


@pytest.mark.parametrize("operator", EVERY)
def test_a_refusal_leaves_the_model_as_it_was(operator):
    model = mlp(nn.BatchNorm1d(5, track_running_stats=False)).train()
    before = copy.deepcopy(model)
    with pytest.raises(torchlinop.TorchlinopError):
        operator(model, [batch()], forward, nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises((SampleMixingError, OptionError)):
        operator(model, [batch()], forward, nn.HuberLoss(), mode="neither")
    assert model.training
    for (name, now), then in zip(model.state_dict().items(), before.state_dict().values()):
        assert torch.equal(now, then), name
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("operator", EVERY)
def test_a_pickled_operator_is_the_same_matrix(operator):
    A = operator(mlp(), [batch()], supervised_forward, nn.CrossEntropyLoss())
    v = torch.linspace(-1, 1, A.size, dtype=A.dtype)
    before = A @ v
    assert torch.equal(pickle.loads(pickle.dumps(A)) @ v, before)


def test_batches_that_count_the_same_weigh_their_samples_alike():
    data = [batch(4), batch(2)]
    options = {"weighting": "batch-mean"}

    def loss(outputs, batch):
        return F.cross_entropy(outputs, batch[1])

    recognised = EmpiricalFisherOperator(mlp(), data, forward, nn.CrossEntropyLoss(), **options)
    custom = EmpiricalFisherOperator(mlp(), data, forward, loss, **options)
    torch.testing.assert_close(custom.to_dense(), recognised.to_dense(), rtol=1e-12, atol=1e-14)
