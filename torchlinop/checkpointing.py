"""Whether activations are checkpointed: noticed while a model is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointFunction


@contextmanager
def noticed_packing() -> Iterator[list[object]]:
    """Fills the list when hooks on saved tensors are entered: checkpointing is made of them.

    A packed tensor is computed again in the backward pass, with the parameters placed then.
    """
    noticed: list[object] = []
    enter = saved_tensors_hooks.__enter__

    def noticing(self: saved_tensors_hooks) -> None:
        noticed.append(self)
        return enter(self)

    saved_tensors_hooks.__enter__ = noticing  # type: ignore[method-assign]
    try:
        yield noticed
    finally:
        saved_tensors_hooks.__enter__ = enter  # type: ignore[method-assign]


@contextmanager
def noticed_reentrance() -> Iterator[list[object]]:
    """Fills the list when a segment is checkpointed reentrantly.

    If none of the segment's inputs needs a gradient, the graph does not show it at all.
    """
    noticed: list[object] = []
    apply: Callable[..., Any] = CheckpointFunction.apply

    def noticing(*args: Any) -> Any:
        noticed.append(args[0])
        return apply(*args)

    CheckpointFunction.apply = noticing
    try:
        yield noticed
    finally:
        del CheckpointFunction.apply  # inherited again
