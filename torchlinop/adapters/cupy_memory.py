"""One memory seen by torch and by CuPy, each on a stream that waits for the other's."""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from torchlinop.adapters.dlpack import exchangeable
from torchlinop.articles import with_article
from torchlinop.errors import OptionError, VectorError

# DLDeviceType of DLPack.
_CUDA = 2
_MEMORY = {1: "host memory", 3: "page-locked host memory", 13: "managed CUDA memory"}

_LEGACY, _PER_THREAD = 1, 2  # names of default streams in CUDA


def cupy(submodule: str = "cupy") -> Any:
    """CuPy, or a module of it, imported when first used.

    Raises:
        OptionError: it is not installed.
    """
    try:
        module: ModuleType = importlib.import_module(submodule)
    except ImportError as error:
        major = (torch.version.cuda or "13").split(".", maxsplit=1)[0]
        raise OptionError(
            f'as_cupy_operator needs CuPy: pip install "torchlinop[cuda{major}]"'
        ) from error
    return module


def tensor_of_cupy(x: Any, device: torch.device) -> Tensor:
    """The memory of a CuPy array as a tensor, once CuPy has written it. A copy if reversed.

    To be called, like all here, under ``torch.cuda.device(device)``.

    Raises:
        VectorError: x is no CuPy array in the memory of this device, or CuPy works on a per-thread
            default stream.
    """
    _refuse_elsewhere(x, device)
    cupy_stream(device)  # refused here, before a product
    if any(stride < 0 for stride in x.strides):
        x = x.copy()
    try:
        return from_dlpack(x)
    except BufferError as error:
        raise VectorError(
            f"expected a CuPy array that torch can share on {device}, got one of {x.dtype} "
            f"({error}); pass a copy in ordinary device memory, cupy.array(x)"
        ) from error


def cupy_of(y: Tensor) -> Any:
    """The memory of a tensor as a CuPy array, contiguous (2-D: in C or Fortran order).

    CuPy's stream waits for torch's. And torch's allocator, which would give the memory away for
    its own stream as soon as CuPy drops it, is told of CuPy's.

    Raises:
        VectorError: CuPy works on a per-thread default stream.
    """
    y = exchangeable(y)
    stream = cupy_stream(y.device)
    if stream.cuda_stream != torch.cuda.current_stream(y.device).cuda_stream:
        y.record_stream(stream)
    return cupy().from_dlpack(y)


def copy_of_cupy(x: Any, device: torch.device) -> Tensor:
    """A copy in torch's memory, which CuPy's stream waits for before it reuses that of x."""
    y = tensor_of_cupy(x, device).clone()
    stream, current = cupy_stream(device), torch.cuda.current_stream(device)
    if stream.cuda_stream != current.cuda_stream:
        stream.wait_stream(current)
    return y


def cupy_stream(device: torch.device) -> torch.cuda.Stream:
    """CuPy's current stream, as one of torch's.

    Raises:
        VectorError: it is a per-thread default stream.
    """
    pointer: int = cupy().cuda.get_current_stream().ptr
    enabled = os.environ.get("CUPY_CUDA_PER_THREAD_DEFAULT_STREAM", "0") != "0"
    if pointer == _PER_THREAD or (pointer == 0 and enabled):
        raise VectorError(
            "expected CuPy on the legacy default stream, which torch uses, or one of its own, got "
            "the per-thread default stream; unset CUPY_CUDA_PER_THREAD_DEFAULT_STREAM, or enter "
            "cupy.cuda.Stream()"
        )
    if pointer in (0, _LEGACY):
        return torch.cuda.default_stream(device)
    return torch.cuda.ExternalStream(pointer, device=device)


def _refuse_elsewhere(x: Any, device: torch.device) -> None:
    """Raise VectorError unless x is a CuPy array in ordinary memory of this device."""
    wanted = f"expected a cupy.ndarray on {device}, got"
    if isinstance(x, Tensor):
        grad = " that requires grad" if x.requires_grad else ""
        raise VectorError(
            f"{wanted} a torch.Tensor on {x.device}{grad}; multiply tensors by the operator itself"
        )
    if not isinstance(x, cupy().ndarray):
        name = f"{type(x).__module__}.{type(x).__qualname__}"
        raise VectorError(
            f"{wanted} {with_article(name)}; pass cupy.asarray(x), say, or as_linear_operator"
        )
    kind, index = x.__dlpack_device__()
    if kind != _CUDA:
        memory = _MEMORY.get(kind, f"memory of DLPack device type {kind}")
        raise VectorError(
            f"{wanted} one in {memory}; copy it with CuPy's usual allocator, "
            "cupy.cuda.set_allocator(cupy.cuda.MemoryPool().malloc)"
        )
    if index != (device.index or 0):
        raise VectorError(
            f"{wanted} one on cuda:{index}; copy it there: with cupy.cuda.Device("
            f"{device.index or 0}): x = cupy.array(x)"
        )
