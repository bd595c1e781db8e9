"""How much memory is free."""

from __future__ import annotations

from pathlib import Path

import torch

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
