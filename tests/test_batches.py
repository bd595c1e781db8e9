"""Batches are trees: mapping keeps their form, parts join to the whole."""

import collections
import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from torchlinop import batches
from torchlinop.errors import BatchError, EmptyDataError, OneShotDataError

CPU = torch.device("cpu")
X, Y = torch.arange(14.0).view(7, 2), torch.arange(7)


@dataclasses.dataclass(frozen=True)
class Record:
    x: torch.Tensor
    note: str


FORMS = {
    "tensor": X,
    "tuple": (X, Y),
    "list": [X, [Y]],
    "dict": {"x": X, "y": (Y, "text")},
    "user dict": collections.UserDict(x=X, y=Y),
    "ordered": collections.OrderedDict(b=X, a=Y),
    "dataclass": Record(X, "note"),
}


@pytest.mark.parametrize("form", FORMS)
def test_mapping_the_identity_keeps_the_form_and_the_tensors(form):
    batch = FORMS[form]
    same = batches.tree_map(lambda t: t, batch)
    assert type(same) is type(batch)
    assert [id(t) for t in batches.tensors(same)] == [id(t) for t in batches.tensors(batch)]


@pytest.mark.parametrize("form", FORMS)
def test_mapping_does_not_change_the_batch_it_is_given(form):
    batch = FORMS[form]
    before = [t.clone() for t in batches.tensors(batch)]
    batches.tree_map(lambda t: t + 1, batch)
    after = batches.tensors(batch)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 9])
@pytest.mark.parametrize("form", FORMS)
def test_parts_of_a_split_join_to_the_whole(form, size):
    parts = list(batches.split(FORMS[form], size))
    assert [batches.count_samples(p) for p in parts[:-1]] == [size] * (len(parts) - 1)
    whole = parts[0]
    for part in parts[1:]:
        whole = batches.join(whole, part)
    for a, b in zip(batches.tensors(whole), batches.tensors(FORMS[form]), strict=True):
        assert torch.equal(a, b)


def test_splitting_leaves_tensors_without_a_sample_axis_whole():
    batch = {"x": X, "y": Y, "class_weight": torch.ones(3), "scale": torch.tensor(2.0)}
    first = next(batches.split(batch, 3))
    assert [len(first[k]) for k in ("x", "y", "class_weight")] == [3, 3, 3]
    assert first["scale"] == 2


def test_batches_of_other_shapes_do_not_join():
    assert batches.join((X,), (X[:, :1],)) is None


def test_a_batch_without_sample_axis_cannot_be_split():
    with pytest.raises(BatchError, match="a tuple of 1 parts: it cannot be split"):
        batches.take((torch.tensor(1.0),), 0, 1)


@pytest.mark.parametrize(
    ("data", "one"),
    [
        ((X, Y), True),
        ({"x": X}, True),
        (X, True),
        ([X, Y], False),
        ([(X, Y)], False),
        (((X, Y), (X, Y)), False),
        (({"x": X}, Y), True),
        (collections.namedtuple("Pair", "a b")({"x": X}, Y), True),
        (Record(X, ""), True),
        (DataLoader(TensorDataset(X)), False),
    ],
)
def test_a_bare_batch_is_told_from_batches(data, one):
    assert batches.is_one_batch(data) == one


@pytest.mark.parametrize("data", [[], (), iter([]), DataLoader(TensorDataset(X[:0]))])
def test_empty_data_are_refused(data):
    with pytest.raises(
        EmptyDataError, match="the data gave no batches; pass a list or a DataLoader"
    ):
        batches.pin(data, None, CPU)


def test_data_that_are_not_iterable_are_refused():
    with pytest.raises(BatchError, match="got an int; put a single batch into a list"):
        batches.pin(3, None, CPU)


def test_an_iterator_is_one_shot():
    with pytest.raises(OneShotDataError, match=r"empty after the first product.*pin_data=True"):
        batches.refuse_one_shot(iter([X]))


def test_a_loader_that_reuses_its_memory_is_copied():
    def reusing():
        buffer = torch.empty(2)
        for i in range(3):
            yield buffer.fill_(i)

    assert [float(b[0]) for b in batches.pin(reusing(), None, CPU)] == [0, 1, 2]


def test_batches_in_a_list_are_not_copied():
    assert batches.pin([X], None, CPU)[0].data_ptr() == X.data_ptr()


def test_pinning_leaves_the_random_state_alone():
    before = torch.random.get_rng_state()
    batches.pin(DataLoader(TensorDataset(X), 2, shuffle=True), None, CPU)
    assert torch.equal(before, torch.random.get_rng_state())


def test_other_libraries_batches_are_moved_by_their_own_method():
    class Graph:
        def to(self, device):
            return f"on {device}"

    assert batches.to_device(Graph(), CPU) == "on cpu"


def test_leaves_of_other_libraries_are_moved_inside_a_batch_too():
    class Graph:
        def to(self, device):
            return f"on {device}"

    assert batches.to_device((Graph(), X), CPU)[0] == "on cpu"


@pytest.mark.parametrize("texts", [["a"] * 7, tuple("abcdefg"), np.arange(7)])
def test_batches_with_samples_in_lists_or_arrays_are_not_cut_apart(texts):
    with pytest.raises(BatchError, match="it cannot be split; leave microbatch_size out"):
        batches.take({"text": texts, "x": X}, 0, 3)
    assert batches.join((texts, X), (texts, X)) is None


def test_a_data_set_of_samples_is_refused_with_the_loader_to_use():
    with pytest.raises(BatchError, match=r"got a TensorDataset of samples; pass DataLoader\("):
        batches.pin(TensorDataset(X, Y), None, CPU)


def test_tensors_of_inference_mode_are_copied_to_enter_graphs():
    with torch.inference_mode():
        x = torch.ones(2)
    assert not batches.to_device(x, CPU).is_inference()
