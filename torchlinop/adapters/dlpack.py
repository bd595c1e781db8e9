"""One memory seen by torch and by NumPy: views where both allow it, copies where one does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchlinop.articles import with_article
from torchlinop.errors import VectorError

Array = NDArray[np.generic]

_NUMPY_OF_TORCH: dict[torch.dtype, np.dtype[Any]] = {
    torch.float64: np.dtype(np.float64),
    torch.float32: np.dtype(np.float32),
    torch.complex64: np.dtype(np.complex64),
    torch.complex128: np.dtype(np.complex128),
    # ARPACK and LOBPCG know no half precision: such operators compute in it, but speak float32.
    torch.bfloat16: np.dtype(np.float32),
    torch.float16: np.dtype(np.float32),
}
_TORCH_OF_NUMPY = {
    np.dtype(np.float32): torch.float32,
    np.dtype(np.complex64): torch.complex64,
    np.dtype(np.complex128): torch.complex128,
    np.dtype(np.clongdouble): torch.complex128,
}


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """The NumPy dtype in which vectors of a torch dtype are exchanged.

    Raises:
        VectorError: NumPy's solvers have nothing to exchange it in.
    """
    if dtype not in _NUMPY_OF_TORCH:
        raise VectorError(
            f"expected an operator in one of {', '.join(map(str, _NUMPY_OF_TORCH))}, got {dtype}; "
            "build it in float32"
        )
    return _NUMPY_OF_TORCH[dtype]


def torch_dtype(dtype: np.dtype[np.generic] | None) -> torch.dtype:
    """The torch dtype that computes with vectors of a NumPy dtype; float64 for all others."""
    return _TORCH_OF_NUMPY.get(np.dtype(dtype).newbyteorder("="), torch.float64)


def tensor_of(x: Array, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``x`` as a tensor: a view of the same memory if dtype, device and layout allow it.

    ``torch.from_numpy`` is three to four times faster than DLPack here. It takes no negative
    strides nor fractions of an item, and misaligned, read-only and foreign-endian arrays are not
    safe to share. On its way to a GPU, ``x`` passes through page-locked memory, and has been read
    when this returns.
    """
    exchanged = numpy_dtype(dtype)
    if x.dtype != exchanged:
        x = x.astype(exchanged)
    elif not (x.flags.writeable and x.flags.aligned) or any(
        stride < 0 or stride % x.itemsize for stride in x.strides
    ):
        x = x.copy()
    t = torch.from_numpy(x)
    if device.type == "cuda":
        t = staging_like(t).copy_(t).to(device, non_blocking=True)
    return t.to(dtype=dtype, device=device)


def array_of(y: Tensor) -> Array:
    """``y`` as a writable contiguous array (2-D: in C or Fortran order), a view if it can be.

    Returns when the data have arrived, from a GPU in page-locked memory that the array owns.
    """
    y = exchangeable(y)
    if y.is_cuda:
        y = staging_like(y).copy_(y, non_blocking=True)
        torch.cuda.current_stream(y.device).synchronize()
    array: Array = y.cpu().numpy()
    return array


def exchangeable(y: Tensor) -> Tensor:
    """``y`` contiguous (2-D: in C or Fortran order), conjugated, in a dtype of other libraries."""
    y = y.detach().resolve_conj().resolve_neg()
    if y.dtype in (torch.bfloat16, torch.float16):
        y = y.float()
    if y.is_contiguous() or (y.ndim == 2 and y.mT.is_contiguous()):
        return y
    return y.contiguous()


def staging_like(t: Tensor) -> Tensor:
    """Page-locked host memory in the layout of ``t``, which torch recycles and never shares."""
    return torch.empty_like(t, device="cpu", pin_memory=True)


def host_array(x: object) -> Array:
    """What a solver passed, as a plain ndarray; refuses arrays that lie on a GPU.

    Raises:
        VectorError: the array is not in host memory.
    """
    if hasattr(x, "__cuda_array_interface__"):
        name = f"{type(x).__module__}.{type(x).__name__}"
        raise VectorError(
            f"expected a NumPy array, got {with_article(name)} on the GPU; "
            "bring it to the host, or take as_cupy_operator(operator)"
        )
    return np.asarray(x)
