"""Named tensors and one JSON header in a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from torchlinop.dtypes import dtype_named, name_of
from torchlinop.errors import OptionError, TorchlinopError
from torchlinop.parameters import ParameterLayout, Slot

_KEY = "torchlinop"  # under which the header is found
_COMPLEX = "torchlinop.complex"  # and the names of tensors that are complex


def write(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write the tensors, moved to the CPU, and the header. Complex tensors are stored as pairs.

    Raises:
        OptionError: the package safetensors is not installed, or the path cannot be written.
    """
    safetensors = _safetensors()
    # Not every version of safetensors has complex numbers.
    numbers = {name: t.detach().resolve_conj() for name, t in tensors.items()}
    pairs = {name: torch.view_as_real(t) for name, t in numbers.items() if t.is_complex()}
    dense = {name: t.cpu().contiguous().clone() for name, t in (numbers | pairs).items()}
    metadata = {_KEY: json.dumps(header), _COMPLEX: json.dumps([*pairs])}
    try:
        safetensors.torch.save_file(dense, str(path), metadata=metadata)
    except (OSError, safetensors.SafetensorError) as error:
        raise OptionError(
            f"cannot write {path} ({error}); pass the path of a file in a directory that exists"
        ) from error


def read(path: str | Path, device: torch.device | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on ``device``, and the header.

    Raises:
        OptionError: the package safetensors is not installed, the file is not one of ours, or
            the device is none of this machine.
    """
    safetensors = _safetensors()
    where = usable_device(device)
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).to(where) for name in list(file.keys())}
    except (OSError, safetensors.SafetensorError) as error:
        raise OptionError(
            f"cannot read {path} as a safetensors file ({error}); pass the path of a file written "
            "by .save"
        ) from error
    with intact(path):
        for name in json.loads(metadata.get(_COMPLEX, "[]")):
            # Cloned, as numbers in the file are aligned to 8 bytes, not to 16.
            tensors[name] = torch.view_as_complex(tensors[name].clone())
    return tensors, _header(path, metadata)


@contextmanager
def intact(path: str | Path) -> Iterator[None]:
    """What is made of a file inside must find all that it looks for.

    Raises:
        OptionError: it does not: the file is damaged, incomplete, or not what its header says.
    """
    try:
        yield
    except TorchlinopError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise OptionError(
            f"{path} is damaged or incomplete ({type(error).__name__}: {error}); pass a file as "
            ".save wrote it"
        ) from error


def _header(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        header = json.loads(metadata.get(_KEY, "null"))
    except json.JSONDecodeError:
        header = None
    if not isinstance(header, dict):
        raise OptionError(
            f"expected a file written by .save, got {path}, which has no header {_KEY!r} in JSON; "
            "pass the path of such a file"
        )
    return header


def usable_device(device: torch.device | str) -> torch.device:
    """The device; OptionError if it is none of this machine."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:  # as torch was built
        raise OptionError(
            f"expected a device of this machine, got {str(device)!r} ({error}); "
            'pass device="cpu", say'
        ) from error


def layout_as_json(layout: ParameterLayout | None) -> dict[str, Any] | None:
    """The layout in numbers and strings."""
    if layout is None:
        return None
    slots = [
        [list(s.names), list(s.shape), s.offset, name_of(s.dtype), str(s.device)]
        for s in layout.slots
    ]
    return {"slots": slots, "frozen": layout.frozen, "filtered": layout.filtered}


def layout_from_json(written: Mapping[str, Any] | None) -> ParameterLayout | None:
    """The layout again."""
    if written is None:
        return None
    slots = [
        Slot(tuple(names), torch.Size(shape), offset, dtype_named(dtype), torch.device(device))
        for names, shape, offset, dtype, device in written["slots"]
    ]
    return ParameterLayout(tuple(slots), tuple(written["frozen"]), tuple(written["filtered"]))


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch  # noqa: PLC0415  # an optional package
    except ImportError as error:
        raise OptionError(
            "saving and loading need the package safetensors; run: pip install safetensors"
        ) from error
    return safetensors
