"""Ritz pairs of Lanczos steps without a restart, whatever their vectors were made orthogonal to."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinop.algorithms.basis import small_dtype
from torchlinop.algorithms.krylov_schur import Ritz, Status, Target, order_of
from torchlinop.algorithms.products import Products
from torchlinop.algorithms.ritz_result import Found
from torchlinop.algorithms.tridiagonal import Recurrence
from torchlinop.errors import OrthogonalityWarning

_ONE_VALUE = 20.0  # times the rounding of the products: copies that have converged agree to it


def plain_lanczos(
    products: Products, start: Tensor, steps: int, mode: str, target: Target, *, peak_bytes: int
) -> Found:
    """The wanted pairs after ``steps`` products, fewer where there is no more time or space.

    Values that agree to rounding are reported once in the modes that make copies, ``"local"`` and
    ``"none"``: multiplicities are lost.
    """
    recurrence = Recurrence(products, start, steps, mode, keep_basis=True)
    stop = _advanced(recurrence)
    T = recurrence.result()
    values, Y = torch.linalg.eigh(T.matrix())
    norm = float(values.abs().max())
    chosen = order_of(values, target.which)
    if mode in ("local", "none"):
        chosen = _distinct(values, chosen, _ONE_VALUE * target.zero * norm)
    X = recurrence.basis.combine(Y[:, chosen[: target.k]].to(small_dtype(start.dtype)))
    lengths = recurrence.space.norm(X)
    X = X.div_(lengths)
    residuals = T.residual_norm * Y[-1, chosen].abs()
    residuals[: target.k] /= lengths.double().cpu()  # of a basis that is not orthonormal
    floor = 2 * target.eps * norm
    ritz = Ritz(values[chosen], Y[:, chosen], residuals, Y[-1:, chosen], norm, floor)
    everywhere = len(chosen) >= target.k and bool(target.reached(ritz).all())
    return Found(
        ritz,
        X,
        "converged" if everywhere else stop,
        "recurrence",
        [(products.matvecs, ritz.values[: target.k], ritz.residuals[: target.k])],
        f"Lanczos, {mode} reorthogonalization",
        basis_size=steps,
        peak_bytes=peak_bytes,
        notes=(_copies(mode),) if mode in ("local", "none") else (),
        advice={
            "maxmatvecs": f"Raise max_iter (now {steps}), or restart from v0=result.",
            "stagnated": "The Krylov space of the start holds no more, to rounding: take "
            'reorthogonalize="full", which goes on from a random vector.',
        },
    )


def _advanced(recurrence: Recurrence) -> Status:
    """Take the steps, until an invariant subspace is found, looking for it log(m) times."""
    for j in range(recurrence.steps):
        if recurrence.products.late:
            recurrence.steps = j
            return "maxseconds"
        try:
            recurrence.step(j)
        except KeyboardInterrupt:
            if not j:
                raise
            recurrence.steps = j  # of which the last was not completed
            return "interrupted"
        if j & (j + 1) == 0 and bool((recurrence.beta[: j + 1] == 0).any()):
            return "stagnated"
    invariant = bool((recurrence.beta == 0).any())
    return "stagnated" if invariant else "maxmatvecs"


def _distinct(values: Tensor, order: Tensor, distance: float) -> Tensor:
    """The order without values as near as ``distance`` to an earlier one."""
    chosen: list[int] = []
    for i in order.tolist():
        if not chosen or float((values[chosen] - values[i]).abs().min()) > distance:
            chosen.append(i)
    return torch.tensor(chosen)


def _copies(mode: str) -> OrthogonalityWarning:
    return OrthogonalityWarning(
        f"reorthogonalize={mode!r}: converged eigenvalues come in copies. Values that agree to "
        "rounding are reported once, multiple eigenvalues too; copies that have not converged "
        'yet differ by more and may be among them. Take "full", which restarts to save memory'
    )
