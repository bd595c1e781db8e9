"""Power iteration of PyHessian, with products of any matrix in place of those of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from torchlinop.algorithms.result import optional
from torchlinop.compare.registry import eigensolver
from torchlinop.compare.request import Request
from torchlinop.operators.base import CurvatureOperator


@eigensolver("pyhessian eigenvalues", which=("LM",), requires="pyhessian", on_host=False)
def eigenvalues(A: CurvatureOperator, request: Request) -> tuple[Tensor, Tensor]:
    """One pair after the other, each with its share of the budget."""
    with in_dtype_of(A):
        values, vectors = as_pyhessian(A).eigenvalues(
            maxIter=max(1, request.budget // request.k), tol=request.tol, top_n=request.k
        )
    X = torch.stack([v[0] for v in vectors], dim=1)
    return torch.tensor(values, dtype=A.dtype, device=A.device), X


def as_pyhessian(A: CurvatureOperator) -> Any:
    """An instance of its class that multiplies by A."""
    hessian = optional("pyhessian").hessian
    explicit = hessian.__new__(hessian)
    explicit.model = torch.nn.Module()
    explicit.full_dataset, explicit.device = True, A.device
    explicit.params = [torch.zeros(A.size, dtype=A.dtype, device=A.device)]

    def product(v: list[Tensor]) -> tuple[float, list[Tensor]]:
        Av = A.matvec(v[0].contiguous())
        return float((Av * v[0]).sum()), [Av]

    explicit.dataloader_hv_product = product
    return explicit


@contextmanager
def in_dtype_of(A: CurvatureOperator) -> Iterator[None]:
    """For libraries that draw in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(A.dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
