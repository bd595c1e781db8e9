"""Ritz pairs of Lanczos steps without a restart, whatever their vectors were made orthogonal to."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from torchlinop.algorithms.basis import small_dtype
from torchlinop.algorithms.krylov_schur import Ritz, Status, Target, order_of
from torchlinop.algorithms.orthogonal import real_dtype
from torchlinop.algorithms.products import ROUNDING, Products
from torchlinop.algorithms.ritz_result import Found
from torchlinop.algorithms.tridiagonal import Recurrence
from torchlinop.errors import OrthogonalityWarning

_ONE_VALUE = 20.0  # times the rounding of the products: copies that have converged agree to it


def plain_lanczos(
    products: Products, start: Tensor, steps: int, mode: str, target: Target, *, peak_bytes: int
) -> Found:
    """The wanted pairs after ``steps`` products, fewer where there is no more time or space.

    Values that agree to rounding, and accurate ones that agree to their residuals, are reported
    once in the modes that make copies, ``"local"`` and ``"none"``: multiplicities are lost.
    """
    recurrence = Recurrence(products, start, steps, mode, keep_basis=True)
    stop = _advanced(recurrence)
    ritz = _ritz(recurrence, target)
    # Of a multiple eigenvalue, the Krylov space of one vector holds one copy.
    n, found = products.operator.size, len(ritz.values)
    copies_missing = stop == "stagnated" and 1 < target.k <= found < n
    notes = [_too_small(len(ritz.values))] if copies_missing else []
    if mode in ("local", "none"):
        ritz = _taken(ritz, _distinct(ritz, target))
        notes = [_copies(mode)]
    X = recurrence.basis.combine(ritz.vectors[:, : target.k].to(small_dtype(start.dtype)))
    lengths = recurrence.space.norm(X)
    X = X.div_(lengths.to(real_dtype(X)))
    lengths = torch.cat([lengths.cpu(), torch.ones(len(ritz.values) - len(lengths))])
    ritz = replace(  # of a basis that is not orthonormal
        ritz, residuals=ritz.residuals / lengths, noise=ritz.least(len(lengths)) / lengths
    )
    everywhere = len(ritz.values) >= target.k and bool(target.reached(ritz).all())
    return Found(
        ritz,
        X,
        "converged" if everywhere and not copies_missing else stop,
        "recurrence",
        [(products.matvecs, ritz.values[: target.k], ritz.residuals[: target.k])],
        f"Lanczos, {mode} reorthogonalization",
        basis_size=steps,
        peak_bytes=peak_bytes,
        notes=tuple(notes),
        advice={
            "maxmatvecs": f"Raise max_iter (now {steps}), or restart from v0=result.",
            "stagnated": "The Krylov space of the start holds no more, to rounding: take "
            'reorthogonalize="full", which goes on from a random vector.',
        },
    )


def _ritz(recurrence: Recurrence, target: Target) -> Ritz:
    """All pairs of T, in the order wanted, as if the basis were orthonormal."""
    T = recurrence.result()
    values, Y = torch.linalg.eigh(T.matrix())
    order = order_of(values, target.which)
    values, Y = values[order], Y[:, order]
    norm = float(values.abs().max())
    floor = 2 * ROUNDING * target.eps * norm  # of many steps that nothing makes good
    # What was taken from vectors or dropped, T does not know; and the recurrence rounds as well.
    unknown = recurrence.errors[: len(Y)].cpu() @ Y.abs()
    noise = (unknown**2 + floor**2).sqrt()
    residuals = torch.hypot(noise, T.residual_norm * Y[-1])
    return Ritz(values, Y, residuals, Y[-1:], norm, floor, noise)


def _taken(ritz: Ritz, chosen: Tensor) -> Ritz:
    """Some of the pairs."""
    columns = ("values", "vectors", "residuals", "coupling", "noise")
    return replace(ritz, **{name: getattr(ritz, name)[..., chosen] for name in columns})


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


def _distinct(ritz: Ritz, target: Target) -> Tensor:
    """Which pairs are no copies of more accurate ones, in their order.

    A copy under way differs by more than rounding, but by less than its residual.
    """
    values, least = ritz.values, _ONE_VALUE * target.zero * ritz.norm
    accurate = replace(target, k=len(values)).reached(ritz)
    radii = torch.where(accurate, ritz.residuals, 0.0)
    chosen: list[int] = []
    for i in torch.argsort(ritz.residuals, stable=True).tolist():
        distances = (values[chosen] - values[i]).abs()
        if bool((distances > (radii[chosen] + radii[i]).clamp_min(least)).all()):
            chosen.append(i)
    return torch.tensor(sorted(chosen))


def _copies(mode: str) -> OrthogonalityWarning:
    return OrthogonalityWarning(
        f"reorthogonalize={mode!r}: converged eigenvalues come in copies. Values that agree to "
        "rounding are reported once, multiple eigenvalues too; copies that have not converged "
        'yet differ by more and may be among them. Take "full", which restarts to save memory'
    )


def _too_small(size: int) -> OrthogonalityWarning:
    return OrthogonalityWarning(
        f"the Krylov space of the start ended after {size} products, as it does where eigenvalues "
        "are multiple: further copies of them may belong to the pairs wanted. Take "
        'reorthogonalize="full", which goes on from a random vector'
    )
