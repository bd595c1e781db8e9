"""What matrices of outputs and of samples refuse, in a sentence, and the model as it was."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import torchlinop
from torchlinop import (
    EmpiricalFisherOperator,
    FisherOperator,
    GGNOperator,
    GradientCovarianceOperator,
    GradientOuterOperator,
    HessianOperator,
    JacobianOperator,
    as_linear_operator,
)
from torchlinop.errors import (
    BatchError,
    CheckpointError,
    DoubleBackwardError,
    LossShapeError,
    NonDeterministicDataError,
    NonFiniteError,
    NoParametersError,
    OptionError,
    ProductBudgetError,
    SampleMixingError,
    WeightingError,
)
from torchlinop.losses import CrossEntropy, supervised_forward

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
    with pytest.raises(OptionError, match=r"unknown option 'colum_chunk'; did you mean .*column_"):
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
    with pytest.raises(DoubleBackwardError, match=r"the loss .* has no second derivative"):
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

    with pytest.raises(DoubleBackwardError, match=r"sparse gradient, .* call it with sparse=False"):
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
    for name, tensor in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
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


def with_labels(sizes, masked):
    torch.manual_seed(2)
    batches = [(torch.randn(n, 6).double(), torch.randint(0, 3, (n,))) for n in sizes]
    for b, n in masked.items():
        batches[b][1][:n] = -100
    return batches


def mean_cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("operator", [HessianOperator, EmpiricalFisherOperator])
def test_masks_that_first_come_late_in_data_read_again_count(operator):
    data = with_labels([4] * 11, {9: 2, 10: 3})
    pinned = operator(mlp(), data, mean_cross_entropy).to_dense()
    again = operator(mlp(), data, mean_cross_entropy, pin_data=False).to_dense()
    torch.testing.assert_close(again, pinned, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "build",
    [
        lambda data: JacobianOperator(mlp(), data, forward, pin_data=False),
        lambda data: FisherOperator(
            mlp(), data, forward, nn.CrossEntropyLoss(), mc_samples=1, pin_data=False
        ),
        lambda data: EmpiricalFisherOperator(
            mlp(), data, mean_cross_entropy, per_sample=False, pin_data=False
        ),
    ],
    ids=["Jacobian", "Monte Carlo Fisher", "of batches"],
)
def test_shuffled_data_read_again_are_refused_where_their_order_matters(build):
    dataset = torch.utils.data.TensorDataset(*batch(12))
    build(torch.utils.data.DataLoader(dataset, batch_size=4))
    with pytest.raises(NonDeterministicDataError, match="other batches, or another order, on whi"):
        build(torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True))


def similarities(model, batch):
    return model(batch[0]) @ model(batch[0]).T


@pytest.mark.parametrize("options", [{}, {"mc_samples": 1}], ids=["empirical", "Monte Carlo"])
def test_logits_between_samples_have_no_matrix_of_samples(options):
    operator = FisherOperator if options else EmpiricalFisherOperator
    loss = CrossEntropy(targets=lambda batch: torch.arange(len(batch[0])))
    message = r"a sample has outputs of shape \(1, 4\) in its batch, \(1, 1\) alone"
    with pytest.raises(SampleMixingError, match=message):
        operator(mlp(), [batch()], similarities, loss, **options)


def test_samples_with_different_numbers_of_rows_have_no_draws():
    keep = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()
    x = torch.randn(3, 3, 6).double()
    data = [(x, keep, torch.randint(0, 3, (6,)))]
    loss = CrossEntropy(targets=lambda b: b[2])
    with pytest.raises(SampleMixingError, match=r"a sample has outputs of shape \(2, 3\) in its"):
        FisherOperator(mlp(), data, lambda m, b: m(b[0])[b[1]], loss, mc_samples=1)


def test_a_loss_of_one_entry_is_a_scalar():
    scalar = EmpiricalFisherOperator(mlp(), [batch()], mean_cross_entropy).to_dense()
    entry = EmpiricalFisherOperator(
        mlp(), [batch()], lambda m, b: mean_cross_entropy(m, b).reshape(1)
    )
    torch.testing.assert_close(entry.to_dense(), scalar, rtol=1e-12, atol=1e-14)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 3)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        hidden = checkpoint(
            lambda t: torch.tanh(self.first(t)), x, use_reentrant=self.use_reentrant
        )
        return self.second(hidden)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("method", ["autograd", "forward_over_reverse", "finite_difference"])
def test_a_reentrant_checkpoint_of_the_inputs_is_refused(method):
    with pytest.raises(CheckpointError, match="reentrant checkpointing"):
        GGNOperator(
            Checkpointed(True).double(), [batch()], forward, nn.CrossEntropyLoss(), method=method
        )


@pytest.mark.parametrize(
    ("method", "tolerance"),
    [("autograd", 1e-12), ("forward_over_reverse", 1e-12), ("finite_difference", 1e-8)],
)
@pytest.mark.parametrize("operator", [GGNOperator, EmpiricalFisherOperator])
def test_checkpointed_models_have_the_matrix_of_plain_ones(operator, method, tolerance):
    model = Checkpointed(False).double()
    plain = nn.Sequential(model.first, nn.Tanh(), model.second)
    arguments = ([batch()], forward, nn.CrossEntropyLoss())
    ours = operator(model, *arguments, method=method).to_dense()
    expected = operator(plain, *arguments).to_dense()
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance * float(expected.max()))


def test_the_empirical_fisher_of_a_checkpointed_loss_is_that_of_the_plain_one():
    model = Checkpointed(False).double()
    plain = nn.Sequential(model.first, nn.Tanh(), model.second)
    ours = EmpiricalFisherOperator(model, [batch()], mean_cross_entropy).to_dense()
    expected = EmpiricalFisherOperator(plain, [batch()], mean_cross_entropy).to_dense()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-14)


def test_a_loss_in_float32_of_a_float64_model_has_an_empirical_fisher():
    def half_as_precise(model, batch):
        return F.cross_entropy(model(batch[0]).float(), batch[1])

    ours = EmpiricalFisherOperator(mlp(), [batch()], half_as_precise).to_dense()
    expected = EmpiricalFisherOperator(mlp(), [batch()], mean_cross_entropy).to_dense()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6 * float(expected.max()))


def test_finite_differences_of_coarser_outputs_are_refused():
    with pytest.raises(OptionError, match=r"computes in torch.float64.*got values in torch.float3"):
        GGNOperator(
            mlp(),
            [batch()],
            lambda m, b: m(b[0]).float(),
            nn.CrossEntropyLoss(),
            method="finite_difference",
        )


def test_finite_differences_of_coarser_parameters_are_refused():
    model = nn.Sequential(nn.Linear(6, 3).bfloat16())
    x, y = batch()
    with pytest.raises(OptionError, match="which rounds the step away"):
        HessianOperator(model, [(x.bfloat16(), y)], mean_cross_entropy, method="finite_difference")


def test_the_outer_product_of_a_gradient_needs_a_graph_and_finite_numbers():
    @torch.no_grad()
    def without_graph(model, batch):
        return mean_cross_entropy(model, batch)

    with pytest.raises(LossShapeError, match="the loss does not require grad"):
        GradientOuterOperator(mlp(), [batch()], without_graph)
    x, y = batch()
    with pytest.raises(NonFiniteError, match="in batch 0 the loss is nan"):
        GradientOuterOperator(mlp(), [(x * torch.nan, y)], mean_cross_entropy)
    with pytest.raises(NonFiniteError, match="outputs on batch 0 hold NaN or infinity"):
        JacobianOperator(mlp(), [(x * torch.nan, y)], forward)
    with pytest.raises(NonFiniteError, match="outputs on batch 0 hold NaN or infinity"):
        EmpiricalFisherOperator(mlp(), [(x * torch.nan, y)], forward, nn.CrossEntropyLoss())


@pytest.mark.parametrize("seed", [None, -1, 0.5])
def test_a_seed_that_is_no_number_is_refused(seed):
    with pytest.raises(OptionError, match="expected sampling_seed to be an integer of at least 0"):
        FisherOperator(
            mlp(), [batch()], forward, nn.CrossEntropyLoss(), mc_samples=1, sampling_seed=seed
        )


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_of_no_column_is_refused(chunk):
    with pytest.raises(OptionError, match="expected chunk to be at least 1"):
        JacobianOperator(mlp(), [batch()], forward).to_dense(chunk)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"column_chunk": 2.5}, "expected column_chunk to be an integer of at least 1, got 2.5"),
        ({"memory_budget": "2G"}, "expected memory_budget to be a number of bytes, got '2G'"),
    ],
)
def test_options_of_another_type_are_refused(option, message):
    with pytest.raises(OptionError, match=message):
        GGNOperator(mlp(), [batch()], forward, nn.CrossEntropyLoss(), **option)


def test_a_budget_of_products_counts_those_with_the_transpose():
    J = JacobianOperator(mlp(), [batch()], forward)
    A = as_linear_operator(J, max_matvecs=2)
    A.H @ np.ones(A.shape[0])
    A @ np.ones(A.shape[1])
    with pytest.raises(ProductBudgetError):
        A.H @ np.ones(A.shape[0])


def test_an_empty_batch_of_a_sum_adds_nothing():
    x, y = batch()
    for operator in (FisherOperator, EmpiricalFisherOperator, GGNOperator):
        arguments = (forward, nn.CrossEntropyLoss(reduction="sum"))
        extra = {"mc_samples": 1} if operator is FisherOperator else {}
        whole = operator(mlp(), [(x, y)], *arguments, **extra).to_dense()
        split = operator(mlp(), [(x, y), (x[:0], y[:0])], *arguments, **extra).to_dense()
        torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-14)
