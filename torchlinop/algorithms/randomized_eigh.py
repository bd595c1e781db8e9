"""A ≈ Q (Q^H A Q) Q^H where Q spans A^(q+1) Ω for a few random columns Ω."""

from __future__ import annotations

import time

from torchlinop.algorithms.eigen_result import EigenResult
from torchlinop.algorithms.products import Products
from torchlinop.algorithms.rayleigh_ritz import Projector, residual_block
from torchlinop.algorithms.ritz_result import Found, eigen_result, ritz_of, target_of
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
        OptionError: k, oversampling, power_iterations or tol do not fit.
        NonFiniteError, SymmetryError: the products are not those of a fixed symmetric matrix.
    """
    started = time.perf_counter()
    target = target_of(op, k, "LM", tol)
    if oversampling < 0 or power_iterations < 0:
        raise OptionError(
            "expected oversampling and power_iterations to be at least 0, got "
            f"{oversampling} and {power_iterations}; leave them out for 10 and 1"
        )
    space, width = op.space, min(op.size, k + oversampling)
    products = Products(op)
    projector = Projector(products, seed)
    Q = starting_block(op, None, width, seed)
    for draw in range(1, power_iterations + 2):
        AQ = products.columns(Q)
        rounding = target.zero * space.norm(AQ).double().max()
        Q = independent(space, AQ, rounding, width, seed=seed, draw=draw)
    AQ = products.columns(Q)
    small = projector(Q, AQ, "LM")
    Y = small.Y[:, :k].to(device=Q.device, dtype=Q.dtype)
    X, AX = Q @ Y, AQ @ Y
    _, residuals = residual_block(space, X, AX, small.values[:k], projector.norm)
    ritz = ritz_of(small, residuals, projector)
    reached = bool(target.reached(ritz).all())
    found = Found(
        ritz,
        X,
        "converged" if reached else "maxmatvecs",
        "true",
        [(products.matvecs, ritz.values[:k], residuals)],
        f"randomized range, {power_iterations} power iterations",
        basis_size=width,
        peak_vectors=4 * width,
        advice="Raise power_iterations or oversampling, or take lanczos.",
    )
    return eigen_result(products, found, target, seed=seed, started=started)
