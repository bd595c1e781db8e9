"""A ≈ Q (Q^H A Q) Q^H where Q spans A^(q+1) Ω for a few random columns Ω."""

from __future__ import annotations

import torch

from torchlinop.algorithms.eigen_request import target_of
from torchlinop.algorithms.eigen_result import EigenResult
from torchlinop.algorithms.probes import checked_seed
from torchlinop.algorithms.products import run_of_products
from torchlinop.algorithms.rayleigh_ritz import Projector
from torchlinop.algorithms.ritz_result import Found, bytes_of, eigen_result
from torchlinop.algorithms.scaled_product import scaled_product
from torchlinop.algorithms.sizes import refuse_fractions
from torchlinop.algorithms.starting_block import independent, starting_block
from torchlinop.errors import OptionError
from torchlinop.operators.base import CurvatureOperator


def randomized_eigh(
    op: CurvatureOperator,
    k: int = 10,
    *,
    oversampling: int = 10,
    power_iterations: int = 1,
    tol: float | None = None,
    seed: int = 0,
) -> EigenResult:
    """The k eigenpairs of largest magnitude, from ``power_iterations + 2`` blocks of products.

    The randomized range finder with a Rayleigh-Ritz step (Halko, Martinsson and Tropp, SIAM Review
    53, 2011, algorithms 4.4 and 5.3); A may be indefinite. For matrices of quickly decaying
    eigenvalues, and where products in large blocks are cheap. The error in the range is about
    |λ_{l+1}|, l = k + oversampling, and each power iteration divides what is left of
    it in pair i by |λ_i / λ_{l+1}|.

    How accurate it is cannot be asked for: ``residual_norms`` tells, by true products, and pairs
    beyond ``tol`` are marked in the result, without a Python warning. ``lanczos`` iterates to an
    accuracy.

    Costs ``(power_iterations + 2) (k + oversampling)`` products, in as many calls as there are
    blocks, and 4 blocks of memory. The host waits for the device once a block.

    Raises:
        OptionError: k, oversampling, power_iterations, seed or tol do not fit.
        NonFiniteError, SymmetryError: the products are not those of a fixed symmetric matrix.
    """
    target = target_of(op, k, "LM", tol)
    seed = checked_seed(seed)
    refuse_fractions(oversampling=oversampling, power_iterations=power_iterations)
    if oversampling < 0 or power_iterations < 0:
        raise OptionError(
            "expected oversampling and power_iterations to be at least 0, got "
            f"{oversampling} and {power_iterations}; leave them out for 10 and 1"
        )
    space, width = op.space, min(op.size, k + oversampling)
    blocks = power_iterations + 2
    Q = starting_block(op, None, width, seed)
    with run_of_products(op) as products:
        for draw in range(1, blocks):
            AQ = torch.empty_like(Q.mT).mT
            scaled_product(products, Q, None, AQ)
            rounding = target.zero * space.norm(AQ).max()
            Q = independent(space, AQ, rounding, width, seed=seed, draw=draw)
        ritz, X = Projector(products, seed).pairs(Q, products.columns(Q), "LM", k)
    found = Found(
        ritz,
        X,
        "converged" if bool(target.reached(ritz).all()) else "maxmatvecs",
        "true",
        [(products.matvecs, ritz.values, ritz.residuals)],
        f"randomized range, {power_iterations} power iterations",
        basis_size=width,
        peak_bytes=bytes_of(Q, 4 * width),
        advice={"maxmatvecs": "Raise power_iterations or oversampling, or take lanczos."},
    )
    return eigen_result(products, found, target, seed=seed)
