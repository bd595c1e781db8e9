"""A device in name only, which counts what a solver stores there and what the host reads back.

Its tensors are wrappers around tensors of the CPU, and every operation is run there. What a GPU
would make wait for is plain to see without one: a number or a tensor read by the host, a test of
success after a factorisation, a shape that depends on values.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

_CPU = torch.device("cpu")

# Operations after which CUDA waits for the device, beside transfers.
_WAITS = {
    "_local_scalar_dense",  # float(x), bool(x), x.item()
    "_linalg_eigh",
    "_linalg_svd",
    "_linalg_check_errors",  # of cholesky, solve, inv
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
}


@functools.cache
def pretended() -> torch.device:
    """The device. From the first call on, PyTorch knows of it in this process."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("pretend")
    return torch.device("pretend:0")


class There(Tensor):
    """A tensor of the pretended device."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> There:
        tensor = Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=pretended(),
        )
        tensor.raw = raw
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any, options: Any) -> Any:
        raise RuntimeError(f"{function} outside of `with Device(...)`")

    def tolist(self) -> Any:
        return self.cpu().tolist()


@dataclass(frozen=True)
class Usage:
    """What was counted so far."""

    reads: int  # by the host
    vectors: float  # allocated so far, in vectors of length n
    held: float  # vectors
    peak: float  # vectors


class _MadeThere(TorchFunctionMode):
    """Numbers become a tensor on the CPU first: torch.tensor is not dispatched."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        options = dict(options or {})
        made = function in (torch.tensor, torch.as_tensor)
        if made and options.get("device") == pretended():
            del options["device"]
            return function(*arguments, **options).to(pretended())
        return function(*arguments, **options)


class Device(TorchDispatchMode):
    """Runs operations on the device inside the ``with``, and counts.

    Memory is in vectors of ``size`` numbers of this many bytes; less than half a vector is left
    out. Temporary memory of a kernel is not seen.
    """

    def __init__(self, size: int, itemsize: int = 8) -> None:
        super().__init__()
        self.vector = size * itemsize
        self.reads: Counter[str] = Counter()
        self._users: Counter[int] = Counter()  # tensors by the address of their memory
        self._held = self._peak = self._allocated = 0.0
        self._numbers = _MadeThere()

    def __enter__(self) -> Device:
        self._numbers.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._numbers.__exit__(*error)

    @property
    def usage(self) -> Usage:
        return Usage(self.reads.total(), self._allocated, self._held, self._peak)

    def move(self, raw: Tensor) -> Tensor:
        """A tensor of the CPU, as one of this device; its memory counts from here on."""
        if isinstance(raw, There):
            return raw
        tensor = There(raw)
        storage = raw.untyped_storage()
        if 2 * storage.nbytes() >= self.vector:
            self._use(storage.data_ptr(), storage.nbytes() / self.vector)
            weakref.finalize(tensor, self._drop, storage.data_ptr(), storage.nbytes() / self.vector)
        return tensor

    def _use(self, address: int, vectors: float) -> None:
        if not self._users[address]:
            self._held += vectors
            self._allocated += vectors
            self._peak = max(self._peak, self._held)
        self._users[address] += 1

    def _drop(self, address: int, vectors: float) -> None:
        self._users[address] -= 1
        if not self._users[address]:
            self._held -= vectors

    def product(self, product: Any, V: Tensor) -> Tensor:
        """``product(V)`` for a V on this device, of which the result alone counts."""
        with _disable_current_modes():
            return self.move(product(V.raw if isinstance(V, There) else V))

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        options = options or {}
        name, written = _facts(function)
        here = any(map(_is_there, (*arguments, *options.values())))
        stays = here
        raw_options = {key: _raw(value) for key, value in options.items()}
        if options.get("device") is not None:
            stays = torch.device(options["device"]) == pretended()
            raw_options["device"] = _CPU
        if here and (name in _WAITS or not stays or _by_mask(name, arguments)):
            self.reads[name] += 1
        if name == "copy_" and here and not isinstance(arguments[0], There):
            self.reads[name] += 1
        found = function(*map(_raw, arguments), **raw_options)
        if written is not None:
            position, key = written
            return arguments[position] if position < len(arguments) else options[key]
        return tree_map_only(Tensor, self.move, found) if stays else found


@functools.cache
def _facts(function: Any) -> tuple[str, tuple[int, str] | None]:
    """The name, and which argument is written into and returned, if any."""
    schema = function._schema
    places = (
        (i, argument.name)
        for i, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    return schema.name.removeprefix("aten::"), next(places, None)


def _is_there(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_is_there, value))
    return isinstance(value, There)


def _raw(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_raw, value))
    return value.raw if isinstance(value, There) else value


def _by_mask(name: str, arguments: Any) -> bool:
    """Whether the shape of the result depends on the values of a mask."""
    return name == "index" and any(
        isinstance(t, Tensor) and t.dtype == torch.bool for t in arguments[1]
    )
