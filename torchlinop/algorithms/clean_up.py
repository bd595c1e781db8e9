"""A Rayleigh-Ritz step on the eigenvectors found: k products for true residuals."""

from __future__ import annotations

import dataclasses

import torch

from torchlinop.algorithms.krylov_schur import Target
from torchlinop.algorithms.orthogonal import orthonormalize
from torchlinop.algorithms.products import Products
from torchlinop.algorithms.rayleigh_ritz import Projector
from torchlinop.algorithms.ritz_result import Found, named


def cleaned_up(products: Products, found: Found, target: Target, seed: int) -> Found:
    """The pairs seen from the span of those found, orthonormal in working precision.

    Takes k products in one call and 4 k vectors, none if the run is late. After Ctrl-C or where
    it is late, the rounding of a basis that was stored coarser is added to the residuals.
    """
    if found.status in ("interrupted", "maxseconds"):
        return _as_found(found)
    X = found.X
    orthonormalize(products.operator.space, X, 0.0)
    try:
        AX = products.columns(X)
    except KeyboardInterrupt:
        return _as_found(dataclasses.replace(found, status="interrupted"))
    ritz, X = Projector(products, seed, found.ritz.norm).pairs(X, AX, target.which, X.shape[1])
    # The values beyond those wanted are what gaps are measured to.
    others = slice(len(ritz.values), None)
    values = torch.cat([ritz.values, found.ritz.values[others]])
    residuals = torch.cat([ritz.residuals, found.ritz.residuals[others]])
    ritz = dataclasses.replace(ritz, values=values, residuals=residuals)
    status = named(found.status, target, ritz)
    return dataclasses.replace(found, ritz=ritz, X=X, status=status, kind="true")


def _as_found(found: Found) -> Found:
    """The claims with what rounding to the dtype of the basis adds: its ε times ‖A‖."""
    if found.basis_dtype in (None, found.X.dtype):
        return found
    rounding = torch.finfo(found.basis_dtype).eps * found.ritz.norm
    ritz = dataclasses.replace(found.ritz, residuals=found.ritz.residuals + rounding)
    return dataclasses.replace(found, ritz=ritz)
