"""Each example of the gallery begins as a process of its own would: threads and seeds."""

from __future__ import annotations

from typing import Any

import torch

_THREADS = torch.get_num_threads()


def reset(gallery_conf: dict[str, Any], fname: str | None) -> None:
    """Give back what an example may have set for the whole process."""
    torch.set_num_threads(_THREADS)
    torch.manual_seed(0)
