"""Memory for vectors that are written one by one, in large pages where a CPU has them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_LEAST = 2**22  # bytes from which NumPy asks the system for large pages
_ALIGNMENT = 64  # bytes, that of torch: sums by vector units depend on it


def empty_rows(
    rows: int, entries: int, dtype: torch.dtype, device: torch.device | str | None
) -> Tensor:
    """A tensor (rows, entries) of any content.

    To write memory for the first time takes as long as reading it ten times, where every page of
    4 KB is a fault; of a Lanczos step without its product, that was a quarter. NumPy asks for
    pages of 2 MB, and torch does not.
    """
    size = rows * entries * dtype.itemsize
    if torch.empty(0, device=device).device.type != "cpu" or size < _LEAST:
        return torch.empty(rows, entries, dtype=dtype, device=device)
    memory = torch.from_numpy(np.empty(size + _ALIGNMENT, dtype=np.uint8))
    start = -memory.data_ptr() % _ALIGNMENT
    return memory[start : start + size].view(dtype).view(rows, entries)
