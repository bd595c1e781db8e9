"""What a solver holds at once beside the matrix, and how often the host waits for its device."""

from __future__ import annotations

import tracemalloc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchlinop.operators.base import CurvatureOperator

Products = Callable[[], AbstractContextManager[object]]  # what every product is wrapped in


@dataclass(frozen=True)
class Usage:
    """At the most demanding moment outside of products, with the result of the last one."""

    peak_bytes: int
    host_reads: int | None  # of the device by the host; None where there is no other device


def usage_of(
    solve: Callable[[Products], object], A: CurvatureOperator, *, numpy: bool = True
) -> Usage:
    """Run a solver once more, and measure. ``solve`` is given what to wrap products in.

    On the CPU, of tensors of half a vector and more: torch's whenever an operation returns, and
    NumPy's, unless ``numpy=False``, at products 1, 2, 4, 8, ...; temporary memory inside of an
    operation is not seen.
    """
    if A.device.type == "cuda":
        return _on_cuda(solve, A)
    held = _Held(A.size * A.dtype.itemsize // 2)
    with _traced() if numpy else nullcontext(), held:
        solve(held.product)
    return Usage(held.peak, None)


@contextmanager
def _traced() -> Iterator[None]:
    """Python's memory, NumPy's included, is traced; unless it is already."""
    already = tracemalloc.is_tracing()
    if not already:
        tracemalloc.start()
    try:
        yield
    finally:
        if not already:
            tracemalloc.stop()


class _Held(TorchDispatchMode):
    """The bytes of all arrays of at least so many bytes, while they are alive."""

    def __init__(self, least: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._torch = 0
        self._least = least
        self._known: set[int] = set()
        self._inside = False
        self._products = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # PyTorch would import its compiler, and double the time of an operation

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        found = function(*arguments, **(options or {}))
        if not self._inside:
            for tensor in (found,) if isinstance(found, Tensor) else tree_leaves(found):
                if type(tensor) is Tensor:
                    self._hold(tensor.untyped_storage())
        return found

    @contextmanager
    def product(self) -> Iterator[None]:
        """What is allocated here is the matrix's own; its result is seen where it is used."""
        self._products += 1
        if self._products & (self._products - 1) == 0:
            self.peak = max(self.peak, self._torch + self._numpy())
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def _numpy(self) -> int:
        if not tracemalloc.is_tracing():
            return 0
        filters = [tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)]
        traces = tracemalloc.take_snapshot().filter_traces(filters).traces
        return sum(trace.size for trace in traces if trace.size >= self._least)

    def _hold(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), id(storage)
        if size < self._least or key in self._known:
            return
        self._known.add(key)
        self._torch += size
        self.peak = max(self.peak, self._torch)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._torch -= size


def _on_cuda(solve: Callable[[Products], object], A: CurvatureOperator) -> Usage:
    """The allocator's own account, and PyTorch's warnings where the host waits."""
    before = torch.cuda.memory_allocated(A.device)
    peak = _Peak(A.device)
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            solve(peak.product)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    reads = sum("synchronizing" in str(w.message) for w in caught)
    return Usage(max(0, peak.settled() - before), reads)


class _Peak:
    """The most that was allocated on a device outside of products."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._peak = device, 0
        torch.cuda.reset_peak_memory_stats(device)

    def settled(self) -> int:
        self._peak = max(self._peak, torch.cuda.max_memory_allocated(self._device))
        return self._peak

    @contextmanager
    def product(self) -> Iterator[None]:
        self.settled()
        with warnings.catch_warnings(record=True):  # where products wait is not the solver's fault
            yield
        torch.cuda.reset_peak_memory_stats(self._device)
