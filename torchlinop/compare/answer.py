"""What an eigensolver answers: pairs, and what it says of them; bad forms refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchlinop.algorithms.eigen_result import EigenResult
from torchlinop.errors import NonFiniteError, VectorError
from torchlinop.space import VectorSpace
from torchlinop.testing.spectra import places_wanted


@dataclass(frozen=True)
class Answer:
    """At most k pairs, and the claims made of them; None where nothing is claimed."""

    eigenvalues: Tensor  # (m,)
    eigenvectors: Tensor  # (n, m)
    residuals: Tensor | None = None  # (m,) ‖A x − λ x‖, absolute
    converged: Tensor | None = None  # (m,) bool: the residual is below tol |λ|
    bounds: Tensor | None = None  # (m,) an eigenvalue is this near

    def __len__(self) -> int:
        return len(self.eigenvalues)

    def most_wanted(self, k: int, which: str) -> Answer:
        """The first k for ``which``, all that is claimed of them included."""
        order = places_wanted(self.eigenvalues, which, k)
        claims = (self.residuals, self.converged, self.bounds)
        residuals, converged, bounds = (None if c is None else c[order] for c in claims)
        return Answer(
            self.eigenvalues[order], self.eigenvectors[:, order], residuals, converged, bounds
        )


def answer_of(found: Any, space: VectorSpace) -> Answer:
    """What a solver returned as an Answer on the space, in double precision.

    ``found`` is an Answer, an EigenResult or a pair ``(values, vectors)`` of tensors or arrays.

    Raises:
        VectorError: it is something else, or has another shape; NonFiniteError: it holds NaN.
    """
    if isinstance(found, EigenResult):
        found = Answer(
            found.eigenvalues,
            found.eigenvectors,
            found.residual_norms,
            found.converged,
            found.error_bounds,
        )
    if not isinstance(found, Answer):
        found = Answer(*_pair(found))
    values = _tensor(found.eigenvalues).cpu().flatten()
    vectors = _tensor(found.eigenvectors).to(space.device)
    if vectors.ndim != 2 or vectors.shape != (space.size, len(values)):
        raise VectorError(
            f"expected eigenvectors as columns ({space.size}, {len(values)}), one for each of "
            f"{len(values)} eigenvalues, got {tuple(vectors.shape)}; return (values, vectors)"
        )
    for name, tensor in (("eigenvalues", values), ("eigenvectors", vectors)):
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"NaN or infinity in the {name}; look for it in the solver")
    if zero := int((vectors == 0).all(0).sum()):
        raise VectorError(
            f"{zero} of {len(values)} eigenvectors are zero; leave out what was not found"
        )
    claims = {"residuals": found.residuals, "converged": found.converged, "bounds": found.bounds}
    read = {name: _claim(name, claim, len(values)) for name, claim in claims.items()}
    return Answer(_wide(values), _wide(vectors), **read)


def _pair(found: Any) -> tuple[Any, Any]:
    try:
        values, vectors = found
    except (TypeError, ValueError):
        raise VectorError(
            "expected a solver to return (values, vectors), an Answer or an EigenResult, got "
            f"{type(found).__name__}; return eigenvalues (k,) and eigenvectors (n, k)"
        ) from None
    return values, vectors


def _tensor(array: Any) -> Tensor:
    try:
        return torch.as_tensor(array).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise VectorError(
            f"expected numbers, got {type(array).__name__} ({error}); return tensors or arrays"
        ) from error


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _claim(name: str, claim: Any, pairs: int) -> Tensor | None:
    """One statement for every pair, if there are any."""
    if claim is None:
        return None
    flat = _tensor(claim).cpu().flatten()
    if len(flat) != pairs:
        raise VectorError(f"expected {name} of {pairs} pairs, got {len(flat)}; give one for each")
    return flat.bool() if name == "converged" else flat.double()
