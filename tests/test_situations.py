"""The classic failure situations of curvature libraries: here the matrix is right, or refused."""

import collections
import copy
import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from torchlinop import (
    HessianOperator,
    MatrixOperator,
    lanczos,
    solve,
    spectral_density,
    trace,
)
from torchlinop.batches import tree_map
from torchlinop.errors import (
    CheckpointError,
    DoubleBackwardError,
    EmptyDataError,
    LossShapeError,
    NonDeterministicDataError,
    NonFiniteError,
    OneShotDataError,
    OptionError,
    ParameterError,
    PrecisionWarning,
    TrainModeWarning,
    UnusedParameterWarning,
    WeightingError,
)
from torchlinop.testing import gallery
from torchlinop.testing.oracles import dense_hessian


def relative(H, reference):
    return float((H - reference).abs().max() / reference.abs().max())


def truth(problem):
    return dense_hessian(problem.full_loss, problem.parameters)


def assert_exact(H, problem):
    assert relative(H.to_dense(), truth(problem)) < 1e-12


@pytest.mark.parametrize("sizes", [(23,), (16, 7), (22, 1), (9, 9, 5), (1,) * 23])
def test_uneven_last_batches_do_not_change_the_matrix(sizes):
    p = gallery.mlp(sizes=sizes)
    assert_exact(HessianOperator(p.model, p.batches, p.loss_fn), p)


@pytest.mark.parametrize("microbatch_size", [1, 4, 5, 100])
def test_microbatches_that_do_not_divide_the_batch_do_not_change_the_matrix(microbatch_size):
    p = gallery.mlp(sizes=(16, 7))
    H = HessianOperator(p.model, p.batches, p.loss_fn, microbatch_size=microbatch_size)
    assert_exact(H, p)


@pytest.mark.parametrize("sizes", [(6,), (3, 3), (5, 1), (1,) * 6])
@pytest.mark.parametrize("microbatch_size", [None, 1])
def test_padded_labels_count_by_unmasked_tokens(sizes, microbatch_size):
    p = gallery.gpt2(sizes=sizes)
    H = HessianOperator(p.model, p.batches, p.loss_fn, microbatch_size=microbatch_size)
    V = H.space.random(2)
    assert relative(H @ V, truth_of_gpt2() @ V) < 1e-12


@functools.cache
def truth_of_gpt2():
    """One dense matrix for all batchings of the same rows."""
    return truth(gallery.gpt2())


def test_the_loss_a_hugging_face_model_computes_is_weighted_right():
    p = gallery.gpt2()
    whole = HessianOperator(p.model, [p.full_batch], gallery.hugging_face_loss)
    parts = HessianOperator(p.model, p.batches, gallery.hugging_face_loss)
    V = whole.space.random(2)
    # That loss is computed in float32 in any model.
    assert relative(parts @ V, whole @ V) < 1e-5
    assert "unmasked next tokens" in repr(parts)


def test_masked_labels_of_a_tuple_batch_count_by_unmasked_labels():
    p = gallery.mlp(sizes=(9, 9, 5))
    p.full_batch[1][[0, 3, 4, 11, 20]] = -100  # shared with the batches, as views
    H = HessianOperator(p.model, p.batches, p.loss_fn)
    assert_exact(H, p)
    assert "unmasked labels" in repr(H)


def test_a_batch_whose_labels_are_all_masked_counts_nothing():
    p = gallery.mlp(sizes=(9, 9, 5))
    p.full_batch[1][18:] = -100
    assert_exact(HessianOperator(p.model, p.batches, p.loss_fn), p)


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_shuffled_loader_gives_one_fixed_matrix(drop_last):
    p = gallery.mlp()
    loader = DataLoader(TensorDataset(*p.full_batch), 9, shuffle=True, drop_last=drop_last)
    H = HessianOperator(p.model, loader, p.loss_fn, linearization="rebuild")
    assert torch.equal(H.to_dense(), H.to_dense())
    seen = 18 if drop_last else 23
    assert f"{seen} samples" in repr(H)


def test_a_shuffled_loader_that_is_read_again_gives_the_matrix_of_all_data():
    p = gallery.mlp()
    loader = DataLoader(TensorDataset(*p.full_batch), 9, shuffle=True)
    assert_exact(HessianOperator(p.model, loader, p.loss_fn, pin_data=False), p)


class Augmented(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, i):
        return torch.randn(6).double() + i, i % 3


def test_random_augmentation_is_drawn_once():
    p = gallery.mlp()
    H = HessianOperator(p.model, DataLoader(Augmented(), 5), p.loss_fn, linearization="rebuild")
    assert torch.equal(H.to_dense(), H.to_dense())


def test_unpinned_random_augmentation_is_refused():
    p = gallery.mlp()
    with pytest.raises(
        NonDeterministicDataError, match=r"Cause: random augmentation.*pin_data=True"
    ):
        HessianOperator(p.model, DataLoader(Augmented(), 5), p.loss_fn, pin_data=False)


def test_unpinned_shuffling_that_drops_the_last_batch_is_refused():
    p = gallery.mlp()
    loader = DataLoader(TensorDataset(*p.full_batch), 9, shuffle=True, drop_last=True)
    with pytest.raises(NonDeterministicDataError, match="RandomSampler with drop_last=True"):
        HessianOperator(p.model, loader, p.loss_fn, pin_data=False)


def test_a_generator_is_read_once_and_kept():
    p = gallery.mlp()
    H = HessianOperator(p.model, (batch for batch in p.batches), p.loss_fn)
    assert_exact(H, p)
    assert_exact(H, p)


def test_an_unpinned_generator_is_refused():
    p = gallery.mlp()
    with pytest.raises(OneShotDataError, match="the data are a generator: empty after"):
        HessianOperator(p.model, (b for b in p.batches), p.loss_fn, pin_data=False)


def test_dropout_and_batchnorm_are_evaluated_in_eval_mode_with_one_warning():
    p = gallery.cnn()
    expected = truth(p)
    p.model.train()
    with pytest.warns(TrainModeWarning, match="1 Dropout and 1 BatchNorm modules") as warned:
        H = HessianOperator(p.model, p.batches, p.loss_fn)
    assert relative(H.to_dense(), expected) < 1e-12
    assert [w.filename for w in warned] == [__file__]  # once, and at the line that builds it
    assert p.model.training


def test_train_mode_pins_one_dropout_mask_a_batch():
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double().train()
    p = gallery.mlp()
    options = {"mode": "train", "linearization": "rebuild"}
    H = HessianOperator(model, p.batches, p.loss_fn, **options)
    v = H.space.random(1)[:, 0]
    first = H @ v
    torch.rand(5)
    assert torch.equal(H @ v, first)
    assert H.check(strict=True).symmetry < 1e-14
    other = HessianOperator(model, p.batches, p.loss_fn, seed=1, **options)
    assert relative(other @ v, first) > 0.01


@pytest.mark.parametrize("method", ["forward_over_reverse", "finite_difference"])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_every_evaluation_of_a_batch_draws_the_same_random_numbers(method, noise):
    p = gallery.mlp()
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3)).double()

    def noisy(model, batch):
        x, y = batch
        return F.cross_entropy(model(x + noise * torch.randn_like(x)), y)

    data = ([p.full_batch], noisy)
    exact = HessianOperator(model, *data, mode="train")
    other = HessianOperator(model, *data, mode="train", method=method, column_chunk=2)
    V = exact.space.random(5)
    assert relative(other @ V, exact @ V) < 1e-7


def test_train_mode_of_batchnorm_differentiates_through_the_batch_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double().train()
    X, y = torch.randn(23, 6).double(), torch.randint(0, 3, (23,))
    H = HessianOperator(model, [(X, y)], gallery.cross_entropy, mode="train")
    expected = dense_hessian(
        lambda: gallery.cross_entropy(copy.copy(model), (X, y)), list(model.parameters())
    )
    assert relative(H.to_dense(), expected) < 1e-10


def test_unused_parameters_have_zero_rows_and_one_warning_names_them():
    p = gallery.mlp()
    p.model.spare = nn.Linear(2, 2).double()

    def loss(model, batch):
        return F.cross_entropy(model[2](model[1](model[0](batch[0]))), batch[1])

    with pytest.warns(
        UnusedParameterWarning, match=r"2 of 6 tensors \(6 of 59 entries\).*spare"
    ) as w:
        H = HessianOperator(p.model, p.batches, loss)
    dense = H.to_dense()
    assert [warning.filename for warning in w] == [__file__]
    assert torch.count_nonzero(dense[53:]) == torch.count_nonzero(dense[:, 53:]) == 0
    p.model.__delattr__("spare")
    assert relative(dense[:53, :53], truth(p)) < 1e-12


def test_a_parameter_used_by_a_later_batch_only_is_not_called_unused():
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}).double()
    batches = [("a", torch.ones(2, 3).double()), ("b", torch.ones(4, 3).double())]
    H = HessianOperator(
        model, batches, lambda m, b: m[b[0]](b[1]).pow(2).mean(), weight=lambda b: len(b[1])
    )
    assert torch.linalg.matrix_rank(H.to_dense()) == 4


def test_frozen_parameters_are_left_out():
    p = gallery.mlp()
    p.model[0].requires_grad_(False)
    H = HessianOperator(p.model, p.batches, p.loss_fn)
    assert H.size == 18
    assert H.layout.status["0.weight"] == "frozen"
    assert_exact(H, p)


def test_tied_weights_have_one_slot():
    p = gallery.tied()
    H = HessianOperator(p.model, p.batches, p.loss_fn)
    assert H.size == 7 * 4 + 4 * 4 + 4
    assert H.layout.aliases == {"head.weight": "embed.weight"}
    assert_exact(H, p)


def test_parameters_that_share_memory_without_being_one_object_have_one_slot():
    p = gallery.tied()
    p.model.head.weight = nn.Parameter(p.model.embed.weight.data)
    H = HessianOperator(p.model, p.batches, p.loss_fn)
    assert relative(H.to_dense(), truth(gallery.tied())) < 1e-12


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"),
            r"shape \(9,\), expected a",
        ),
        (lambda m, b: 0.5, "returned a float, expected a scalar tensor"),
        (lambda m, b: F.cross_entropy(m(b[0]).detach(), b[1]), "does not require grad"),
    ],
)
def test_a_loss_that_is_no_differentiable_scalar_is_refused(loss, message):
    p = gallery.mlp()
    with pytest.raises(LossShapeError, match=message):
        HessianOperator(p.model, p.batches, loss)


@pytest.mark.parametrize("linearization", ["keep", "rebuild"])
def test_nan_in_the_data_names_batch_and_parameter(linearization):
    p = gallery.mlp()
    p.batches[1][0][0, 0] = torch.nan
    H = HessianOperator(
        p.model, p.batches, p.loss_fn, weight=lambda b: len(b[1]), linearization=linearization
    )
    with pytest.raises(
        NonFiniteError, match=r"in batch 1 the loss is nan and the gradient of 0\.weight"
    ):
        H @ torch.ones(H.size).double()


def test_a_singular_second_derivative_is_named():
    model = nn.Linear(2, 1, bias=False).double()
    H = HessianOperator(
        model, [torch.zeros(1, 2).double()], lambda m, x: (m(x).abs() ** 1.5).sum() + m.weight.sum()
    )
    with pytest.raises(NonFiniteError, match="a derivative is singular"):
        H @ torch.ones(2).double()


def test_nan_in_the_vector_is_the_callers_own():
    p = gallery.mlp()
    H = HessianOperator(p.model, p.batches, p.loss_fn)
    assert torch.isnan(H @ torch.full((53,), torch.nan).double()).all()


@pytest.mark.parametrize("method", ["autograd", "finite_difference"])
def test_reentrant_checkpointing_is_refused(method):
    p = gallery.checkpointed(use_reentrant=True)
    with pytest.raises(CheckpointError, match="use_reentrant=False"):
        HessianOperator(p.model, p.batches, p.loss_fn, method=method)


def test_checkpointed_segments_are_recomputed_at_the_parameters_of_the_operator():
    p = gallery.checkpointed()
    expected = truth(p)
    H = HessianOperator(p.model, p.batches, p.loss_fn)
    assert H.linearization == "rebuilt"
    with torch.no_grad():
        for parameter in p.parameters:
            parameter.add_(1)
    assert relative(H.to_dense(), expected) < 1e-12


def test_keeping_the_graph_of_a_checkpointed_model_is_refused():
    p = gallery.checkpointed()
    with pytest.raises(CheckpointError, match='pass linearization="rebuild"'):
        HessianOperator(p.model, p.batches, p.loss_fn, linearization="keep")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_model_is_differentiated_through_its_eager_module():
    p = gallery.mlp()
    compiled = torch.compile(p.model)
    H = HessianOperator(compiled, p.batches, p.loss_fn)
    assert H.layout.names[0] == "0.weight"
    assert_exact(H, p)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_submodule_runs_eagerly():
    p = gallery.mlp()
    expected = truth(p)
    p.model[0] = torch.compile(p.model[0])
    H = HessianOperator(p.model, p.batches, p.loss_fn)
    assert relative(H.to_dense(), expected) < 1e-12


def test_a_data_parallel_wrapper_is_looked_through():
    p = gallery.mlp()
    H = HessianOperator(nn.DataParallel(p.model), p.batches, p.loss_fn)
    assert H.layout.names[0] == "0.weight"
    assert_exact(H, p)


@pytest.mark.filterwarnings("ignore")  # what torch.distributed says is not ours
def test_a_distributed_data_parallel_wrapper_is_looked_through(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        p = gallery.mlp()
        wrapped = nn.parallel.DistributedDataParallel(p.model)
        assert_exact(HessianOperator(wrapped, p.batches, p.loss_fn), p)
    finally:
        torch.distributed.destroy_process_group()


def test_a_bfloat16_model_has_float32_vectors_and_reports_its_noise():
    p = gallery.mlp(torch.bfloat16)
    H = HessianOperator(p.model, p.batches, p.loss_fn)
    assert H.dtype == torch.float32
    with pytest.warns(PrecisionWarning, match="eigenvalues below .* are not meaningful"):
        report = H.check()
    assert 1e-4 < report.noise < 0.1
    p.model.double()
    full = tree_map(lambda t: t.double() if t.is_floating_point() else t, p.full_batch)
    exact = dense_hessian(lambda: p.loss_fn(p.model, full), p.parameters)
    assert relative(H.to_dense().double(), exact) < 0.1


@pytest.mark.parametrize("linearization", ["keep", "rebuild"])
def test_autocast_is_off_inside(linearization):
    p = gallery.mlp(torch.float32)
    H = HessianOperator(p.model, p.batches, p.loss_fn, linearization=linearization)
    v = H.space.random(1)[:, 0]
    expected = H @ v
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(H @ v, expected)


RUNS = {
    "product": lambda A: (A @ torch.ones(60)).tolist(),
    "check": lambda A: A.check().symmetry,
    "lanczos": lambda A: lanczos(A, 3, which="LA").eigenvalues.tolist(),
    "orthogonality": lambda A: lanczos(A, 3, which="LA").orthogonality_loss,
    "trace": lambda A: trace(A, 40).estimate,
    "density": lambda A: spectral_density(A, 2, 10).density.tolist(),
    "solve": lambda A: solve(A, torch.ones(60), damping=5.0).x.tolist(),
}


@pytest.mark.parametrize("name", RUNS)
def test_solvers_compute_with_autocast_off(name):
    A = MatrixOperator(gallery.with_spectrum(torch.linspace(1, 60, 60).double())[0].float())
    expected = RUNS[name](A)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert RUNS[name](A) == expected


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("linearization", ["keep", "rebuild"])
def test_everything_works_without_gradients(context, linearization):
    p = gallery.mlp()
    expected = truth(p)
    with context():
        H = HessianOperator(p.model, p.batches, p.loss_fn, linearization=linearization)
        Hv = H @ torch.ones(53).double()
    assert relative(Hv, expected @ torch.ones(53).double()) < 1e-12
    assert not Hv.requires_grad


def test_sparse_embeddings_are_exact():
    p = gallery.tied()
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Tanh(), nn.Linear(4, 7)).double()
    H = HessianOperator(model, p.batches, p.loss_fn)
    model[0].sparse = False
    expected = dense_hessian(lambda: p.loss_fn(model, p.full_batch), list(model.parameters()))
    assert relative(H.to_dense(), expected) < 1e-12


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3).double()

    def forward(self, x):
        return self.second(torch.tanh(self.first(x.float())).double())


def test_parameters_of_several_dtypes_share_one_vector_of_the_widest():
    p = gallery.mlp()
    model = Mixed()
    H = HessianOperator(model, p.batches, p.loss_fn)
    assert H.dtype == torch.float64
    dense = H.to_dense()
    first = list(model.first.parameters())
    model.double()
    model.forward = lambda x: model.second(torch.tanh(model.first(x)))
    expected = dense_hessian(
        lambda: p.loss_fn(model, p.full_batch), [*first, *model.second.parameters()]
    )
    assert relative(dense, expected) < 1e-6  # one layer computes in float32


Point = collections.namedtuple("Point", ["inputs", "targets"])


@dataclasses.dataclass(frozen=True)
class Record:
    inputs: torch.Tensor
    targets: torch.Tensor
    name: str = "kept"


def as_encoding(x, y):
    from transformers import BatchEncoding

    return BatchEncoding({"inputs": x, "labels": y})


@pytest.mark.parametrize(
    ("make", "unpack"),
    [
        (lambda x, y: [x, y], tuple),
        (lambda x, y: {"inputs": x, "labels": y}, lambda b: (b["inputs"], b["labels"])),
        (Point, lambda b: (b.inputs, b.targets)),
        (Record, lambda b: (b.inputs, b.targets)),
        (
            lambda x, y: collections.UserDict(inputs=x, labels=y),
            lambda b: (b["inputs"], b["labels"]),
        ),
        (as_encoding, lambda b: (b["inputs"], b["labels"])),
        (lambda x, y: {"nested": ((x,), [y])}, lambda b: (b["nested"][0][0], b["nested"][1][0])),
    ],
    ids=["list", "dict", "namedtuple", "dataclass", "UserDict", "BatchEncoding", "nested"],
)
def test_batches_of_every_form_are_counted_and_split(make, unpack):
    p = gallery.mlp()

    def loss(model, batch):
        x, y = unpack(batch)
        return F.cross_entropy(model(x), y)

    H = HessianOperator(p.model, [make(*b) for b in p.batches], loss, microbatch_size=4)
    assert_exact(H, p)


def test_a_bare_batch_is_one_batch():
    p = gallery.mlp()
    assert_exact(HessianOperator(p.model, p.full_batch, p.loss_fn), p)


def test_num_batches_takes_the_first_ones():
    p = gallery.mlp()
    H = HessianOperator(p.model, p.batches, p.loss_fn, num_batches=2)
    X, y = p.full_batch
    expected = dense_hessian(lambda: F.cross_entropy(p.model(X[:18]), y[:18]), p.parameters)
    assert relative(H.to_dense(), expected) < 1e-12
    alone = HessianOperator(p.model, p.batches, p.loss_fn, full_dataset=False)
    assert "9 samples in 1 batch" in repr(alone)


def test_a_loss_whose_terms_cannot_be_counted_is_refused():
    p = gallery.mlp()
    weights = torch.tensor([0.1, 1.0, 7.0]).double()

    def weighted(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], weight=weights)

    with pytest.raises(WeightingError, match=r"have 9, 9, 5 samples.*Pass weight=lambda batch"):
        HessianOperator(p.model, p.batches, weighted)
    H = HessianOperator(p.model, p.batches, weighted, weight=lambda b: weights[b[1]].sum())
    expected = dense_hessian(lambda: weighted(p.model, p.full_batch), p.parameters)
    assert relative(H.to_dense(), expected) < 1e-12


def test_batch_mean_weighs_all_batches_alike():
    p = gallery.mlp()
    H = HessianOperator(p.model, p.batches, p.loss_fn, weighting="batch-mean")
    losses = [dense_hessian(lambda b=b: p.loss_fn(p.model, b), p.parameters) for b in p.batches]
    assert relative(H.to_dense(), sum(losses) / 3) < 1e-12


class Flash(nn.Module):
    def forward(self, x):
        q = x[:, None]
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0][:, 0]


def test_an_attention_kernel_called_directly_is_named_with_its_module():
    model = nn.Sequential(nn.Linear(6, 8), Flash(), nn.Linear(8, 3)).double()
    X, Y = torch.randn(3, 5, 6).double(), torch.randn(3, 5, 3).double()
    H = HessianOperator(model, [(X, Y)], gallery.mean_squared_error)
    message = r"flash_attention.*\(module 1\) has no second .* Load .*attn_implementation=\"eager\""
    with pytest.raises(DoubleBackwardError, match=message):
        H @ torch.ones(H.size).double()
    differences = HessianOperator(
        model, [(X, Y)], gallery.mean_squared_error, method="finite_difference"
    )
    assert differences.check(strict=True).symmetry < 1e-6


def ctc(model, batch):
    log_probabilities = model(batch[0]).log_softmax(-1).transpose(0, 1)
    frames, letters = (torch.full((len(batch[0]),), count) for count in (5, 2))
    return nn.functional.ctc_loss(log_probabilities, batch[1], frames, letters)


def test_an_operation_that_is_no_attention_is_named_without_talk_of_attention():
    X, Y = torch.randn(2, 5, 3).double(), torch.tensor([[1, 2], [1, 2]])
    H = HessianOperator(nn.Linear(3, 4).double(), [(X, Y)], ctc)
    with pytest.raises(DoubleBackwardError, match=r"_ctc_loss_backward.* has no second") as told:
        H @ torch.ones(H.size).double()
    assert "attn" not in str(told.value)
    assert str(told.value).endswith('of other operations, or use method="finite_difference"')


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 3 * g * ctx.saved_tensors[0] ** 2


def test_a_function_that_is_differentiable_once_is_refused():
    model = nn.Linear(3, 1).double()
    with pytest.raises(DoubleBackwardError, match="Once is marked @once_differentiable"):
        HessianOperator(model, [torch.ones(2, 3).double()], lambda m, x: Once.apply(m(x)).mean())


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * g * ctx.saved_tensors[0] ** 2


@pytest.mark.parametrize("method", ["autograd", "forward_over_reverse"])
def test_custom_functions_without_forward_or_batching_rules_are_exact(method):
    model = nn.Linear(3, 1).double()
    X = torch.randn(5, 3).double()
    H = HessianOperator(model, [X], lambda m, x: Cube.apply(m(x)).mean(), method=method)
    expected = dense_hessian(lambda: (model(X) ** 3).mean(), list(model.parameters()))
    assert relative(H @ torch.eye(4).double(), expected) < 1e-12


MODULES = {
    "SiLU": nn.SiLU(),
    "Mish": nn.Mish(),
    "GELU": nn.GELU(),
    "GroupNorm": nn.GroupNorm(2, 4),
    "LayerNorm": nn.LayerNorm(4),
    "Softplus": nn.Softplus(),
    "attention": nn.TransformerEncoderLayer(4, 2, 5, batch_first=True),
}


@pytest.mark.parametrize("method", ["autograd", "forward_over_reverse"])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore::torchlinop.errors.TrainModeWarning")
def test_layers_that_lack_forward_rules_are_exact(name, method):
    layer = copy.deepcopy(MODULES[name])
    model = nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 2)).double().eval()
    X, Y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    H = HessianOperator(model, [(X, Y)], gallery.mean_squared_error, method=method)
    expected = dense_hessian(lambda: F.mse_loss(model(X), Y), list(model.parameters()))
    assert relative(H.to_dense(), expected) < 1e-12


@pytest.mark.parametrize("method", ["autograd", "forward_over_reverse"])
def test_weight_norm_is_exact_though_the_second_derivative_of_torchs_kernel_is_wrong(method):
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)).double()
    X, Y = torch.randn(6, 3).double(), torch.randn(6, 4).double()
    H = HessianOperator(layer, [(X, Y)], gallery.mean_squared_error, method=method)
    b, g, v = (p for p in layer.parameters())

    def loss():
        return F.mse_loss(torch.tanh(0 * b + X @ (g * v / v.norm(dim=1, keepdim=True)).T + b), Y)

    layer.register_forward_hook(lambda module, inputs, output: torch.tanh(output))
    assert relative(H.to_dense(), dense_hessian(loss, [b, g, v])) < 1e-12


@pytest.mark.parametrize("loss", [F.mse_loss, F.huber_loss, F.smooth_l1_loss])
def test_losses_that_forward_mode_cannot_differentiate_fall_back(loss):
    model = nn.Linear(3, 2).double()
    X, Y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    H = HessianOperator(
        model, [(X, Y)], lambda m, b: loss(m(b[0]), b[1]), method="forward_over_reverse"
    )
    expected = dense_hessian(lambda: loss(model(X), Y), list(model.parameters()))
    assert relative(H.to_dense(), expected) < 1e-12


@pytest.mark.parametrize("own", [True, False])
def test_a_loss_that_reaches_parameters_past_the_model_is_refused(own):
    p = gallery.mlp()
    outside = list(p.model.parameters())

    def decayed(model, batch):
        parameters = model.parameters() if own else outside
        return p.loss_fn(model, batch) + 0.5 * sum(q.pow(2).sum() for q in parameters)

    if own:
        H = HessianOperator(p.model, p.batches, decayed)
        assert relative(H.to_dense(), truth(p) + torch.eye(53)) < 1e-12
    else:
        with pytest.raises(ParameterError, match=r"the loss uses 0\.bias, 0\.weight, .* directly"):
            HessianOperator(p.model, p.batches, decayed)


def test_a_frozen_view_of_a_trained_parameter_is_a_constant():
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model = model.double()
    model.b.weight = nn.Parameter(model.a.weight.data, requires_grad=False)
    X = torch.randn(5, 3).double()

    def loss(m, x):
        return m["b"](torch.tanh(m["a"](x))).pow(2).mean()

    H = HessianOperator(model, [X], loss)
    expected = dense_hessian(lambda: loss(model, X), [model.a.weight])
    assert H.layout.status == {"a.weight": "selected", "b.weight": "frozen"}
    assert relative(H.to_dense(), expected) < 1e-12


class CheckpointedFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4).double())

    def forward(self, x):
        def twice(x):
            return torch.tanh(torch.tanh(x @ self.w) @ self.w)

        return torch.utils.checkpoint.checkpoint(twice, x, use_reentrant=False)


def test_checkpointed_functions_without_modules_are_recomputed_at_the_right_parameters():
    model, X = CheckpointedFunction(), torch.randn(5, 4).double()
    expected = dense_hessian(lambda: model(X).pow(2).mean(), [model.w])
    H = HessianOperator(model, [X], lambda m, x: m(x).pow(2).mean())
    assert H.linearization == "rebuilt"
    with torch.no_grad():
        model.w.add_(1)
    assert relative(H.to_dense(), expected) < 1e-12


@pytest.mark.parametrize("method", ["autograd", "forward_over_reverse", "finite_difference"])
@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_batches_that_do_not_involve_the_selected_parameters_add_nothing(method, order):
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}).double()
    X = torch.randn(4, 3).double()
    H = HessianOperator(
        model,
        [(name, X) for name in order],
        lambda m, b: m[b[0]](b[1]).pow(2).mean(),
        weight=lambda b: 1,
        param_filter=lambda name, p: name.startswith("b"),
        method=method,
    )
    b = list(model.b.parameters())
    expected = dense_hessian(lambda: model.b(X).pow(2).mean() / 2, b)
    assert relative(H.to_dense(), expected) < 1e-8
    gradient = torch.autograd.grad(model.b(X).pow(2).mean() / 2, b)
    torch.testing.assert_close(H.gradient(), torch.cat([g.flatten() for g in gradient]))


@pytest.mark.parametrize("weight", [lambda b: -1, lambda b: None, lambda b: float("nan")])
def test_weights_that_are_no_counts_are_refused(weight):
    p = gallery.mlp()
    with pytest.raises(WeightingError, match=r"0 or more, got .* for batch 0; return len"):
        HessianOperator(p.model, p.batches, p.loss_fn, weight=weight)


def test_nan_in_data_that_are_read_again_is_not_called_random():
    p = gallery.mlp()
    p.batches[1][0][0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="the loss over all data is nan; clean"):
        HessianOperator(p.model, p.batches, p.loss_fn, weight=lambda b: 1, pin_data=False)


def test_nan_in_the_first_vector_does_not_hide_nan_in_the_data():
    p = gallery.mlp()
    p.batches[1][0][0, 0] = torch.nan
    H = HessianOperator(p.model, p.batches, p.loss_fn, weight=lambda b: 1)
    H @ torch.full((53,), torch.nan).double()
    with pytest.raises(NonFiniteError, match="in batch 1"):
        H @ torch.ones(53).double()


def test_all_labels_masked_is_refused():
    p = gallery.mlp()
    p.full_batch[1][:] = -100
    with pytest.raises(EmptyDataError, match="0 weights in all batches; check for empty batches"):
        HessianOperator(p.model, p.batches, p.loss_fn, weight=lambda b: (b[1] != -100).sum())


def test_an_error_of_the_loss_is_not_taken_for_a_missing_forward_rule():
    p, calls = gallery.mlp(), []

    def failing(model, batch):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of disk space")
        return p.loss_fn(model, batch)

    H = HessianOperator(p.model, [p.full_batch], failing, method="forward_over_reverse")
    with pytest.raises(RuntimeError, match="out of disk space"):
        H @ torch.ones(53, 3).double()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_scripted_model_is_refused():
    p = gallery.mlp()
    with pytest.raises(
        OptionError, match="got a RecursiveScriptModule; give the operator the model"
    ):
        HessianOperator(torch.jit.script(p.model), p.batches, p.loss_fn)


def test_dropout_between_recurrent_layers_is_noticed():
    model = nn.LSTM(3, 4, num_layers=2, dropout=0.5, batch_first=True).double()
    X = torch.randn(2, 3, 3).double()
    with pytest.warns(TrainModeWarning, match="1 Dropout and 0 BatchNorm"):
        HessianOperator(model, [X], lambda m, x: m(x)[0].pow(2).mean())


def test_a_loss_that_uses_the_model_by_closure_is_exact():
    p = gallery.mlp()
    H = HessianOperator(
        p.model,
        p.batches,
        lambda _, b: F.cross_entropy(p.model(b[0]), b[1]),
        linearization="rebuild",
    )
    assert_exact(H, p)
