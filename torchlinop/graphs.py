"""The nodes of an autograd graph, and the memory they hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.autograd.graph import Node


def ancestors(roots: Iterable[Node | None], known: set[Node] | None = None) -> Iterator[Node]:
    """The nodes of a graph above ``roots``, each once; those in ``known`` are left out."""
    known = set() if known is None else known
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node is not None and node not in known:
            known.add(node)
            yield node
            stack.extend(parent for parent, _ in node.next_functions)


def saved_bytes(outputs: Iterable[Tensor], besides: Iterable[Tensor]) -> int:
    """Bytes that the graphs of ``outputs`` save for backward, without those of ``besides``.

    Every storage counts once. Read off the nodes: hooks on saved tensors would make reference
    cycles of nodes and their outputs.
    """
    ignored = {tensor.untyped_storage().data_ptr() for tensor in besides}
    storages: dict[int, int] = {}
    for node in ancestors([output.grad_fn for output in outputs]):
        for tensor in _saved_by(node):
            if tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(size for address, size in storages.items() if address not in ignored)


def _saved_by(node: Node) -> Iterator[Tensor]:
    names = [name for name in dir(node) if name.startswith("_saved_")]
    for name in [*names, "saved_tensors"]:
        value = getattr(node, name, None)
        values = value if isinstance(value, tuple | list) else [value]
        yield from (v for v in values if isinstance(v, Tensor))
