"""‖A‖₂ = max |λ|, ‖A‖_F² = tr A², ‖A‖_* = tr |A|: norms of a symmetric matrix from products."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from torchlinop.algorithms.extremal import extremal_eigenvalues
from torchlinop.algorithms.gram_schmidt import OrthonormalColumns
from torchlinop.algorithms.hutchinson import of_independent
from torchlinop.algorithms.probes import (
    WIDTH,
    Probes,
    on_host,
    refuse_num_matvecs,
    refuse_seed,
    unit_vectors,
)
from torchlinop.algorithms.products import multiply
from torchlinop.algorithms.quadrature import slq
from torchlinop.algorithms.result import Result
from torchlinop.errors import OptionError
from torchlinop.operators.base import CurvatureOperator

Ord = Literal[2, "fro", "nuc"]

_STEPS = 40  # Lanczos steps a probe, for the nuclear norm
_USUAL = {2: 20, "fro": 60, "nuc": 10 * _STEPS}


@dataclass(frozen=True, repr=False)
class NormResult(Result):
    """An estimate of a norm of A, and where the norm is with probability 0.95 or more."""

    estimate: float
    stderr: float  # of the probes; 0 for the 2-norm, whose error is not one of sampling
    lower: float
    upper: float
    ord: str
    matvecs: int
    operator_size: int
    seed: int
    dtype: torch.dtype
    seconds: float

    _columns: ClassVar[tuple[str, ...]] = ()

    def __float__(self) -> float:
        return self.estimate

    def __repr__(self) -> str:
        error = f" +- {self.stderr:.2g} (1 s.e.)" if self.stderr else ""
        return (
            f"NormResult  {self.ord}-norm {self.estimate:.6g}{error} | in [{self.lower:.6g}, "
            f"{self.upper:.6g}] | {self.matvecs} matvecs | seed {self.seed}"
        )


def norm(
    op: CurvatureOperator,
    ord: Ord = 2,  # as in torch.linalg.norm
    *,
    num_matvecs: int | None = None,
    seed: int = 0,
) -> NormResult:
    """Estimate a norm of A from ``num_matvecs`` products.

    - 2, the largest |λ|: by 20 Lanczos steps, from below; ``num_matvecs + 1`` vectors are kept.
    - ``"fro"``: ``‖A Q‖_F² + E ‖A (I - Q Qᵀ) g‖²``, Hutch++ on A² without its second products.
      Takes 60 and keeps a third as many vectors.
    - ``"nuc"``, Σ |λ|, the trace where A ≥ 0: by quadrature along 40 Lanczos steps from each of 10
      probes. The standard error does not know of the error of the quadrature, which eigenvalues
      near zero make, as |λ| has a kink there.

    The Frobenius and the nuclear norm are exact if n products are granted.

    Raises:
        OptionError: unknown ``ord``, or fewer than one product; NonFiniteError: a product holds
            NaN or infinity.
    """
    start = time.perf_counter()
    if ord not in get_args(Ord):
        raise OptionError(f'unknown ord {ord!r}; choose 2, "fro" or "nuc"')
    m = _USUAL[ord] if num_matvecs is None else num_matvecs
    refuse_num_matvecs(m)
    refuse_seed(seed)
    estimate, stderr, lower, upper, matvecs = _NORMS[ord](op, m, seed)
    seconds = time.perf_counter() - start
    return NormResult(
        estimate, stderr, lower, upper, str(ord), matvecs, op.size, seed, op.dtype, seconds
    )


_Found = tuple[float, float, float, float, int]  # estimate, stderr, lower, upper, matvecs


def _spectral(op: CurvatureOperator, num_matvecs: int, seed: int) -> _Found:
    ends = extremal_eigenvalues(op, num_matvecs, seed=seed)
    found = max(abs(ends.smallest), abs(ends.largest))
    return found, 0.0, found, max(-ends.smallest_bound, ends.largest_bound), ends.matvecs


def _frobenius(op: CurvatureOperator, num_matvecs: int, seed: int) -> _Found:
    if num_matvecs >= op.size:
        columns = torch.cat([_squares(op, E) for E in unit_vectors(op.space)])
        found = float(on_host(op, columns)[0].sum()) ** 0.5
        return found, 0.0, found, found, op.size
    rank = max(0, min(num_matvecs // 3, (num_matvecs - 2) // 2))
    basis = OrthonormalColumns(op.space, rank)
    for S in Probes(op.space, "rademacher", seed, 0).chunks(0, rank):
        basis.extend(multiply(op, S))
    captured = [_squares(op, Q) for Q in basis.Q.split(WIDTH, dim=1)]
    tests = Probes(op.space, "rademacher", seed, 1).chunks(0, num_matvecs - 2 * rank)
    residuals, inside = on_host(
        op,
        torch.cat([_squares(op, basis.project_out(G)) for G in tests]),
        torch.cat(captured).sum(),
    )
    square = of_independent(residuals, float(inside))
    low, high = square.interval(0.95)
    found = square.value**0.5
    # d√x = dx / 2√x
    stderr = square.stderr / (2 * found) if found else 0.0
    return found, stderr, max(low, 0.0) ** 0.5, high**0.5, num_matvecs


def _nuclear(op: CurvatureOperator, num_matvecs: int, seed: int) -> _Found:
    if num_matvecs >= op.size:
        (dense,) = on_host(op, op.to_dense())
        wide = torch.promote_types(dense.dtype, torch.float64)
        found = float(torch.linalg.eigvalsh(dense.to(wide)).abs().sum())
        return found, 0.0, found, found, op.size
    steps = min(_STEPS, max(1, num_matvecs // 2))
    q = slq(op, num_matvecs // steps, steps, seed=seed)
    total = q.spectral_sum(torch.abs)
    return total.estimate, total.stderr, *total.confidence_interval(0.95), q.matvecs


def _squares(op: CurvatureOperator, X: Tensor) -> Tensor:
    """``‖A x‖²`` of every column, in double precision."""
    return op.space.norm(multiply(op, X)).double() ** 2


_NORMS = {2: _spectral, "fro": _frobenius, "nuc": _nuclear}
