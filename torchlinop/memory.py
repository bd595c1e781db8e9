"""How much memory is free, and how much a graph of saved tensors holds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

GIB = 2**30


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on ``device``; 4 GiB where the system does not tell."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    return min(_available_to_machine(), _available_to_container())


def _available_to_machine() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 4 * GIB
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable")), 4 * GIB)


def _available_to_container() -> int:
    """What cgroup v2 leaves to this process; effectively unlimited where it sets no limit."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except OSError:
        return 2**60
    return 2**60 if limit == "max" else max(0, int(limit) - used)


class SavedBytes:
    """Counts the bytes that autograd saves for backward inside the ``with``, each storage once."""

    def __init__(self, besides: Iterable[Tensor]) -> None:
        self._ignored = {tensor.untyped_storage().data_ptr() for tensor in besides}
        self._storages: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda saved: saved)

    @property
    def total(self) -> int:
        """Bytes noted so far."""
        return sum(self._storages.values())

    def _note(self, tensor: Tensor) -> Tensor:
        if tensor.layout != torch.strided:
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._ignored:
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._hooks.__exit__(kind, error, traceback)
