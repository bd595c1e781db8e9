"""All eigenvalues of a small matrix, from n products."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinop.compare.registry import eigensolver
from torchlinop.compare.request import Request
from torchlinop.operators.base import CurvatureOperator
from torchlinop.testing.spectra import places_wanted


@eigensolver("dense eigh", own_cost=True, budgeted=False, max_size=2000, on_host=False)
def eigh(A: CurvatureOperator, request: Request) -> tuple[Tensor, Tensor]:
    """``torch.linalg.eigh`` of the entries, and the pairs wanted of it."""
    values, vectors = torch.linalg.eigh(A.to_dense())
    order = places_wanted(values, request.which, request.k)
    return values[order], vectors[:, order]
