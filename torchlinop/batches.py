"""Batches as trees of tensors: read once and pinned, moved, counted, split and joined."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from torchlinop.articles import kind_of
from torchlinop.errors import BatchError, EmptyDataError, OneShotDataError
from torchlinop.random_state import preserved_generators, preserved_random_state

Batch = Any  # a tensor, or tuples, lists, mappings and dataclasses of batches
Leaf = Callable[[Tensor], Tensor]


@runtime_checkable
class _Movable(Protocol):
    def to(self, device: torch.device) -> Any: ...


def tree_map(
    function: Leaf, batch: Batch, other: Callable[[Any], Any] = lambda leaf: leaf
) -> Batch:
    """The same tree with ``function`` applied to every tensor, and ``other`` to other leaves.

    Knows tensors, tuples, named tuples, lists, mappings (``BatchEncoding`` and ``UserDict``
    too, whose class is kept) and dataclasses.
    """
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, tuple):
        parts = [tree_map(function, part, other) for part in batch]
        return type(batch)._make(parts) if hasattr(batch, "_make") else tuple(parts)
    if isinstance(batch, list):
        return [tree_map(function, part, other) for part in batch]
    if isinstance(batch, MutableMapping):
        same = copy.copy(batch)
        if getattr(same, "data", None) is getattr(batch, "data", batch):
            same.data = copy.copy(batch.data)  # type: ignore[attr-defined]  # UserDict, BatchEncoding
        for key in batch:
            same[key] = tree_map(function, batch[key], other)
        return same
    if isinstance(batch, Mapping):
        return {key: tree_map(function, value, other) for key, value in batch.items()}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        replica = copy.copy(batch)
        for field in dataclasses.fields(batch):
            value = tree_map(function, getattr(batch, field.name), other)
            object.__setattr__(replica, field.name, value)
        return replica
    return other(batch)


def tensors(batch: Batch) -> list[Tensor]:
    """The tensors of a batch in tree order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    tree_map(note, batch)
    return found


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on ``device``; leaves of other libraries are moved by their own ``.to``."""
    return tree_map(
        lambda tensor: _differentiable(tensor.to(device)),
        batch,
        lambda leaf: leaf.to(device) if isinstance(leaf, _Movable) else leaf,
    )


def _differentiable(tensor: Tensor) -> Tensor:
    """Tensors made in inference mode cannot enter a graph; their copies can."""
    return tensor.clone() if tensor.is_inference() else tensor


def detached_copy(batch: Batch) -> Batch:
    """The batch in memory of its own: a loader may reuse the memory of what it yields."""
    return tree_map(lambda tensor: tensor.detach().clone(), batch)


def shell(batch: Batch) -> Batch:
    """The same tensors in containers of their own, which may be emptied."""
    return tree_map(lambda tensor: tensor, batch)


def count_samples(batch: Batch) -> int | None:
    """The length that most tensors of the batch share along their first axis; None if unknown."""
    lengths = Counter(t.shape[0] for t in tensors(batch) if t.ndim > 0)
    return lengths.most_common(1)[0][0] if lengths else None


def can_be_cut(batch: Batch) -> bool:
    """Whether all that counts samples are tensors: lists of texts and NumPy arrays are not cut."""
    samples = count_samples(batch)
    return samples is not None and not _holds_uncut(batch, samples)


def _holds_uncut(part: Batch, samples: int) -> bool:
    if isinstance(part, np.ndarray):
        return bool(part.shape[:1] == (samples,))
    if isinstance(part, Mapping):
        return any(_holds_uncut(value, samples) for value in part.values())
    if isinstance(part, tuple | list):
        listed = len(part) == samples and samples > 0 and not tensors(part)
        return listed or any(_holds_uncut(value, samples) for value in part)
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        return any(_holds_uncut(value, samples) for value in vars(part).values())
    return False


def take(batch: Batch, start: int, stop: int) -> Batch:
    """Samples ``start`` to ``stop``: every tensor whose first axis counts samples is cut (a view).

    Raises:
        BatchError: no axis counts samples, or some part is a list or array of samples.
    """
    samples = count_samples(batch)
    if not can_be_cut(batch):
        raise BatchError(
            f"expected a batch whose parts are tensors with a sample axis first, got "
            f"{describe(batch)}: it cannot be split; leave microbatch_size out"
        )

    def cut(tensor: Tensor) -> Tensor:
        return tensor[start:stop] if tensor.ndim > 0 and tensor.shape[0] == samples else tensor

    return tree_map(cut, batch)


def split(batch: Batch, size: int | None) -> Iterator[Batch]:
    """Parts of at most ``size`` samples in order; the batch itself when ``size`` is None."""
    samples = count_samples(batch)
    if size is None or (samples is not None and samples <= size):
        yield batch
        return
    for start in range(0, samples or 1, size):
        yield take(batch, start, start + size)


def join(a: Batch, b: Batch) -> Batch | None:
    """Both batches as one, joined along the sample axis; None where shapes do not allow it."""
    of_b = tensors(b)
    if [t.shape[1:] for t in tensors(a)] != [t.shape[1:] for t in of_b]:
        return None
    samples = count_samples(a)
    if not (can_be_cut(a) and can_be_cut(b)):
        return None
    other = iter(of_b)

    def cat(tensor: Tensor) -> Tensor:
        partner = next(other)
        counted = tensor.ndim > 0 and tensor.shape[0] == samples
        return torch.cat([tensor, partner]) if counted else tensor

    return tree_map(cat, a)


def describe(batch: Batch) -> str:
    """The form of a batch in a few words, for messages."""
    if isinstance(batch, Mapping):
        return f"{kind_of(batch)} with keys {{{', '.join(map(str, batch))}}}"
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return f"{kind_of(batch)} of {len(batch)} parts"
    return kind_of(batch)


def is_one_batch(data: object) -> bool:
    """Whether the data are a bare batch: a tensor, mapping, tuple of tensors or dataclass.

    A list is always a list of batches, and a tuple of tuples, lists or mappings is a tuple of them.
    """
    if isinstance(data, tuple) and not hasattr(data, "_make"):
        return not all(isinstance(part, tuple | list | Mapping) for part in data)
    if isinstance(data, tuple):
        return True
    return isinstance(data, Tensor | Mapping) or dataclasses.is_dataclass(data)


def read(data: Iterable[Batch], num_batches: int | None, device: torch.device) -> Iterator[Batch]:
    """One pass over the data: at most ``num_batches`` batches, each moved to ``device``.

    Raises:
        BatchError: the data are not iterable.
    """
    if is_one_batch(data):
        data = [data]
    if isinstance(data, Dataset) and not isinstance(data, Iterable):
        raise BatchError(
            f"expected batches, got {kind_of(data)} of samples; "
            "pass DataLoader(dataset, batch_size=...)"
        )
    if not isinstance(data, Iterable):
        raise BatchError(
            f"expected batches in a list, a DataLoader or another iterable, got "
            f"{describe(data)}; put a single batch into a list: [batch]"
        )
    for batch in itertools.islice(data, num_batches):
        yield to_device(batch, device)


def pin(data: Iterable[Batch], num_batches: int | None, device: torch.device) -> tuple[Batch, ...]:
    """All batches, read once and kept on ``device``; the global random state is left as found.

    Batches given in a list are kept as they are; those an iterator yields are copied where
    moving did not copy them.

    Raises:
        EmptyDataError: there is no batch.
    """
    keep: Callable[[Batch], Batch] = (
        (lambda b: b) if isinstance(data, list) or is_one_batch(data) else detached_copy
    )
    with preserved_random_state(device), preserved_generators(data):
        batches = tuple(keep(batch) for batch in read(data, num_batches, device))
    if not batches:
        raise EmptyDataError(
            "the data gave no batches; pass a list or a DataLoader, "
            "and a fresh one if it is an iterator that was read before"
        )
    return batches


def refuse_one_shot(data: object) -> None:
    """Raise OneShotDataError for an iterator, which is empty after its first pass."""
    if isinstance(data, Iterator):
        raise OneShotDataError(
            f"the data are {kind_of(data)}: empty after the first product. "
            "Pass a list or a DataLoader, or pin_data=True"
        )
