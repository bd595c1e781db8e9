"""``torch.lobpcg``, which takes nothing but tensors: a matrix in the guise of one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from torchlinop.compare.registry import eigensolver
from torchlinop.compare.request import Request
from torchlinop.compare.solvers.scipy import steps_within
from torchlinop.operators.base import CurvatureOperator


@eigensolver("torch lobpcg", which=("LA", "SA"), on_host=False)
def lobpcg(A: CurvatureOperator, request: Request) -> tuple[Tensor, Tensor]:
    """Its tolerance is relative to norms. An iteration takes 4k products at most, the first 2k."""
    values, vectors = torch.lobpcg(
        _AsTensor(A),
        X=request.start(A, request.k),
        tol=request.tol_of_norm,
        niter=steps_within(request, -2, 4),
        largest=request.which == "LA",
    )
    return values, vectors


class _AsTensor(Tensor):
    """A matrix without entries, of which products with blocks can be taken."""

    operator: CurvatureOperator
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(cls, A: CurvatureOperator) -> _AsTensor:
        tensor: _AsTensor = Tensor._make_wrapper_subclass(
            cls, A.shape, dtype=A.dtype, device=A.device
        )
        tensor.operator = A
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        if function is torch.ops.aten.mm.default:
            # Autograd is off inside a dispatch, for this thread: products are taken in another.
            with ThreadPoolExecutor(1) as other:
                return other.submit(arguments[0].operator.matmat, arguments[1]).result()
        return NotImplemented
