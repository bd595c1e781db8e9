"""Dtypes by their names, and by how coarse they are."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def name_of(dtype: torch.dtype) -> str:
    """``"float32"`` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """The way back; TypeError for the name of something else."""
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name!r} is no dtype")
    return dtype


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """That with the largest roundoff: what results of all of them can be accurate to."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
