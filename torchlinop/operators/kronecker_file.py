"""Named tensors and one JSON header in a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from torchlinop.errors import OptionError
from torchlinop.parameters import ParameterLayout, Slot

_KEY = "torchlinop"  # under which the header is found


def write(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write the tensors, moved to the CPU, and the header.

    Raises:
        OptionError: the package safetensors is not installed.
    """
    dense = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    _safetensors().torch.save_file(dense, str(path), metadata={_KEY: json.dumps(header)})


def read(path: str | Path, device: torch.device | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on ``device``, and the header.

    Raises:
        OptionError: the package safetensors is not installed, or the file is not one of ours.
    """
    with _safetensors().safe_open(str(path), framework="pt", device=str(device)) as file:
        metadata = file.metadata() or {}
        if _KEY not in metadata:
            raise OptionError(
                f"expected a file written by .save of an operator, got {path}, which has no "
                f"header {_KEY!r}; pass the path of such a file"
            )
        names = list(file.keys())
        return {name: file.get_tensor(name) for name in names}, json.loads(metadata[_KEY])


def layout_as_json(layout: ParameterLayout | None) -> dict[str, Any] | None:
    """The layout in numbers and strings."""
    if layout is None:
        return None
    slots = [
        [list(s.names), list(s.shape), s.offset, _name(s.dtype), str(s.device)]
        for s in layout.slots
    ]
    return {"slots": slots, "frozen": layout.frozen, "filtered": layout.filtered}


def layout_from_json(written: Mapping[str, Any] | None) -> ParameterLayout | None:
    """The layout again."""
    if written is None:
        return None
    slots = [
        Slot(tuple(names), torch.Size(shape), offset, getattr(torch, dtype), torch.device(device))
        for names, shape, offset, dtype, device in written["slots"]
    ]
    return ParameterLayout(tuple(slots), tuple(written["frozen"]), tuple(written["filtered"]))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch  # noqa: PLC0415  # an optional package
    except ImportError as error:
        raise OptionError(
            "saving and loading need the package safetensors; run: pip install safetensors"
        ) from error
    return safetensors
