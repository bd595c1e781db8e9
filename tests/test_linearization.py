"""Work at θ is done once when kept; budgets decide; chunks of columns change no number."""

import pytest
import torch
from torch import nn

from torchlinop import HessianOperator, ReverseOverReverse
from torchlinop.columns import ColumnChunks
from torchlinop.diagnosis import second_derivatives_explained
from torchlinop.errors import DoubleBackwardError, OptionError, ParameterError
from torchlinop.testing import gallery


class Calls:
    """A count that lies outside of the model, whose own attributes are restored."""

    def __init__(self):
        self.number = 0


class CountingModel(nn.Module):
    """Counts forward passes."""

    def __init__(self, model, counts):
        super().__init__()
        self.model = model
        self.counts = counts

    def forward(self, x):
        self.counts.number += 1
        return self.model(x)


def counting(linearization, **options):
    p, counts = gallery.mlp(), Calls()
    H = HessianOperator(
        CountingModel(p.model, counts), p.batches, p.loss_fn, linearization=linearization, **options
    )
    counts.number = 0
    return H, counts


def test_kept_graphs_run_the_model_once_a_batch_for_all_products():
    H, counts = counting("keep")
    for _ in range(5):
        H @ torch.ones(53).double()
    H @ torch.ones(53, 4).double()
    assert counts.number == 3


def test_rebuilt_graphs_run_the_model_once_a_batch_for_each_product_or_block():
    H, counts = counting("rebuild", column_chunk=4)
    H @ torch.ones(53).double()
    H @ torch.ones(53, 9).double()
    assert counts.number == 2 * 3


def test_building_an_operator_takes_one_gradient_and_a_few_samples_for_the_weights():
    p, counts = gallery.mlp(), Calls()
    HessianOperator(CountingModel(p.model, counts), p.batches, p.loss_fn)
    # Of each of three batches: some samples, these twice, their parts, and with the neighbour's.
    assert counts.number == 1 + 3 * (1 + 1 + 2 + 1)


def test_building_an_operator_on_one_batch_takes_one_gradient():
    p, counts = gallery.mlp(), Calls()
    HessianOperator(CountingModel(p.model, counts), [p.full_batch], p.loss_fn)
    assert counts.number == 1


@pytest.mark.parametrize(("budget", "decision"), [(0, "rebuilt"), (2**30, "kept")])
def test_auto_keeps_what_fits_the_budget(budget, decision):
    H, _ = counting("auto", memory_budget=budget)
    assert H.linearization == decision
    assert decision in repr(H)


def test_the_estimate_of_kept_bytes_covers_what_the_graph_must_save():
    # The second-order graph saves at least inputs, hidden activations and logits of a batch.
    p = gallery.mlp(sizes=(23,))
    least = 23 * (5 + 5 + 3) * 8
    assert (
        HessianOperator(p.model, p.batches, p.loss_fn, memory_budget=least).linearization
        == "rebuilt"
    )
    assert (
        HessianOperator(p.model, p.batches, p.loss_fn, memory_budget=40 * least).linearization
        == "kept"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"linearization": "always"}, "unknown linearization 'always'; choose one of auto, keep"),
        ({"linearization": "keep", "method": "finite_difference"}, "shares no work between"),
        (
            {"method": "magic"},
            "unknown method 'magic'; choose one of autograd, forward_over_reverse",
        ),
        ({"fd_eps": 0.1}, "fd_eps is the positive step length of method='finite_difference'"),
        ({"method": "finite_difference", "fd_eps": -1.0}, "fd_eps is the positive step length"),
        ({"column_chunk": 0}, "expected column_chunk to be an integer of at least 1, got 0"),
        ({"microbatch_size": 0}, "expected microbatch_size to be an integer of at least 1, got 0"),
        ({"num_batches": -2}, "expected num_batches to be an integer of at least 1, got -2"),
        ({"num_batches": 2.5}, "expected num_batches to be an integer of at least 1, got 2.5"),
        ({"seed": -1}, "expected seed to be an integer of at least 0, got -1"),
        ({"method": ReverseOverReverse}, r"got a class; pass ReverseOverReverse\(\)"),
        ({"mode": "test"}, "unknown mode 'test'; choose one of eval, train"),
        ({"weighting": "tokens"}, "unknown weighting 'tokens'; choose one of auto, batch-mean"),
        ({"weight": 3}, "expected weight to be a function of a batch, got 3"),
        ({"weight": lambda: 3.0}, "expected weight to be a function of a batch, got <function"),
    ],
)
def test_unknown_options_are_refused_before_the_model_runs(options, message):
    p, counts = gallery.mlp(), Calls()
    with pytest.raises(OptionError, match=message):
        HessianOperator(CountingModel(p.model, counts), p.batches, p.loss_fn, **options)
    assert counts.number == 0


def test_data_that_are_read_again_have_no_graph_to_keep():
    p = gallery.mlp()
    with pytest.raises(OptionError, match="pin_data=False reads new batches"):
        HessianOperator(p.model, p.batches, p.loss_fn, linearization="keep", pin_data=False)


def test_finite_differences_of_half_precision_are_refused():
    p = gallery.mlp(torch.bfloat16)
    with pytest.raises(OptionError, match=r"got some in torch.bfloat16.*model.float\(\)"):
        HessianOperator(p.model, p.batches, p.loss_fn, method="finite_difference")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10])
def test_chunks_of_columns_are_those_of_the_whole_block(size):
    M, V = torch.randn(6, 6).double(), torch.randn(6, 7).double()
    widths, lasts = [], []

    def product(block, *, last=False):
        widths.append(block.shape[1])
        lasts.append(last)
        return M @ block

    chunks = ColumnChunks(size)
    chunks.apply(product, V[:, ::2], last=False)  # which proves that blocks can be multiplied
    del widths[:], lasts[:]
    torch.testing.assert_close(chunks.apply(product, V, last=True), M @ V)
    assert max(widths) == min(size, 7)
    assert lasts == [False] * (len(lasts) - 1) + [True]


@pytest.mark.parametrize("size", [None, 3, 20])
def test_a_map_that_takes_no_blocks_is_applied_column_by_column(size):
    def product(block, *, last=False):
        if block.shape[1] > 1:
            raise RuntimeError("no batching rule")
        return 2 * block

    chunks = ColumnChunks(size)
    V = torch.randn(4, 8)
    torch.testing.assert_close(chunks.apply(product, V, last=False), 2 * V)
    assert chunks.size == 1


def test_a_map_that_multiplies_blocks_otherwise_than_their_columns_is_applied_to_these():
    def product(block, *, last=False):
        return 2 * block if block.shape[1] == 1 else 2 * block.flip(1)

    chunks = ColumnChunks()
    V = torch.randn(4, 8)
    torch.testing.assert_close(chunks.apply(product, V, last=False), 2 * V)
    assert chunks.size == 1


def test_what_is_wrong_with_a_column_is_said_of_a_block():
    def failing(block, *, last=False):
        raise RuntimeError("the model has a mistake")

    with pytest.raises(RuntimeError, match="the model has a mistake"):
        ColumnChunks(2).apply(failing, torch.randn(4, 8), last=False)


@pytest.mark.parametrize("linearization", ["keep", "rebuild"])
def test_operators_leave_no_memory_behind(linearization):
    # The softmax that the loss saves is an output of its own node: hooks on it would be a cycle
    # that the garbage collector cannot see.
    import gc
    import weakref

    saved = []

    def loss(model, batch):
        p = torch.softmax(model(batch[0]), 1)
        saved.append(weakref.ref(p))
        return -p.gather(1, batch[1][:, None]).log().mean()

    p = gallery.mlp()
    H = HessianOperator(p.model, p.batches, loss, linearization=linearization)
    H @ torch.ones(53).double()
    del H
    gc.collect()
    assert saved
    assert all(reference() is None for reference in saved)


def test_a_distributed_tensor_is_refused(monkeypatch):
    model = nn.Linear(2, 2)
    DTensor = type("DTensor", (torch.Tensor,), {})
    monkeypatch.setattr(nn.Parameter, "data", property(lambda p: DTensor(2)))
    with pytest.raises(ParameterError, match=r"is sharded .DTensor.; .*FSDPHessianOperator"):
        HessianOperator(model, [torch.ones(1, 2)], lambda m, x: m(x).sum())


def test_a_compiled_function_that_is_differentiated_twice_is_explained():
    def failing():
        raise RuntimeError("torch.compile does not currently support double backward")

    with (
        pytest.raises(
            DoubleBackwardError, match="Give the operator the model and loss from before"
        ),
        second_derivatives_explained(nn.Linear(1, 1), lambda: torch.ones(())),
    ):
        failing()


def test_the_measured_chunk_stays_within_its_limit():
    chunks = ColumnChunks(limit=4)
    chunks.apply(lambda V, last=False: V.clone(), torch.randn(4, 20), last=False)
    assert chunks.size <= 4
