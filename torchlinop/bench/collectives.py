"""What crosses ranks: the collectives of a stretch of code, and their bytes, seen by dispatch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NAMES = {
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "all_gather_into_tensor_out": "all-gather",
    "reduce_scatter_": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "broadcast_": "broadcast",
    "alltoall_": "all-to-all",
    "all_to_all_single": "all-to-all",
}


class Collectives(TorchDispatchMode):
    """Counts the collectives of this thread while it is entered.

    Bytes are those of the largest tensor that takes part: what is reduced or broadcast, and for
    gathers and scatters the whole.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, int]] = []  # kind and bytes, in order

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            kind = _NAMES.get(func._schema.name.split("::")[1])
            if kind is not None:
                results = func(*args, **(kwargs or {}))
                self.seen.append((kind, _largest((args, kwargs, results))))
                return results
        return func(*args, **(kwargs or {}))

    @property
    def count(self) -> int:
        return len(self.seen)

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.seen)

    def of_kind(self, kind: str) -> list[int]:
        """The bytes of each of this kind."""
        return [size for seen, size in self.seen if seen == kind]


def _largest(arguments: object) -> int:
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    return max((t.nbytes for t in tensors), default=0)
