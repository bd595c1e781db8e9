"""‖A‖₂ = max |λ|, ‖A‖_F² = tr A², ‖A‖_* = tr |A|: norms of a symmetric matrix from products."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from torchlinop.algorithms.basis import small_dtype
from torchlinop.algorithms.early_stop import announced, notes, taken
from torchlinop.algorithms.extremal import ROUNDINGS, bracket
from torchlinop.algorithms.given_operator import refuse_no_operator
from torchlinop.algorithms.gram_schmidt import OrthonormalColumns
from torchlinop.algorithms.hutchinson import of_independent, unseen
from torchlinop.algorithms.probes import (
    WIDTH,
    Probes,
    checked_seed,
    on_host,
    refuse_num_matvecs,
    unit_vectors,
)
from torchlinop.algorithms.products import Products, roundoff, run_of_products
from torchlinop.algorithms.quadrature import quadrature_of
from torchlinop.algorithms.quadrature_result import Rule
from torchlinop.algorithms.result import Result
from torchlinop.algorithms.symmetry_watch import SymmetryWatch
from torchlinop.algorithms.unit_scale import UnitScale
from torchlinop.errors import OptionError
from torchlinop.operators.base import CurvatureOperator

Ord = Literal[2, "fro", "nuc"]

_STEPS = 40  # Lanczos steps a probe, for the nuclear norm
_KNOWN = 1e-5  # of ‖A‖: how sharply a Ritz value must be known to count as an eigenvalue
_USUAL = {2: 20, "fro": 60, "nuc": 10 * _STEPS}


@dataclass(frozen=True, repr=False, eq=False)
class NormResult(Result):
    """An estimate of a norm of A, and where the norm is: with probability 0.99 for the 2-norm,
    0.95 for the others: of the Frobenius norm, from 0.8 on where one or two eigenvalues dominate
    what its sketch has left, and residual samples, a third of the products, are ten or fewer.
    """

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
    warnings: tuple[str, ...] = ()

    _columns: ClassVar[tuple[str, ...]] = ()

    def __float__(self) -> float:
        return self.estimate

    def __repr__(self) -> str:
        error = f" +- {self.stderr:.2g} (1 s.e.)" if self.stderr else ""
        line = (
            f"NormResult  {self.ord}-norm {self.estimate:.6g}{error} | in [{self.lower:.6g}, "
            f"{self.upper:.6g}] | {self.matvecs} matvecs | seed {self.seed}"
        )
        return "\n".join([line, *(f"  {warning}" for warning in self.warnings)])


def norm(
    op: CurvatureOperator,
    ord: Ord = 2,  # as in torch.linalg.norm
    *,
    num_matvecs: int | None = None,
    seed: int = 0,
    max_seconds: float = math.inf,
    progress: bool = False,
) -> NormResult:
    """Estimate a norm of A from ``num_matvecs`` products.

    - 2, the largest |λ|: by 20 Lanczos steps, from below; ``num_matvecs + 1`` vectors are kept.
    - ``"fro"``: ``‖A Q‖_F² + E ‖A (I - Q Qᵀ) g‖²``, Hutch++ on A² without its second products.
      Takes 60 and keeps a third as many vectors.
    - ``"nuc"``, Σ |λ|, the trace where A ≥ 0: by quadrature along 40 Lanczos steps from each of 10
      probes. As |λ| has a kink, eigenvalues near zero make an error that more probes do not
      lessen. ``lower`` and ``upper`` bound it, usually ten times too far: n times the
      Wasserstein distance that the weights of the nodes leave open.

    The Frobenius and the nuclear norm are exact if n products are granted. Ctrl-C, or
    ``max_seconds``, returns what the products taken tell, once they tell something (``"fro"``:
    after two thirds, or what is left of them then); ``progress`` shows a bar on a terminal.

    Raises:
        OptionError: unknown ``ord``, or fewer than one product; NonFiniteError: a product holds
            NaN or infinity. NotConvergedError: time was over before n products for an exact norm.
    """
    refuse_no_operator(op)
    if not isinstance(ord, int | str) or ord not in get_args(Ord):
        raise OptionError(f'unknown ord {ord!r}; choose 2, "fro" or "nuc"')
    m = _USUAL[ord] if num_matvecs is None else num_matvecs
    refuse_num_matvecs(m)
    seed = checked_seed(seed)
    found = _NORMS[ord](op, m, seed, max_seconds, progress)
    result = NormResult(
        found.estimate, found.stderr, found.lower, found.upper, str(ord), found.matvecs, op.size,
        seed, op.dtype, found.seconds, found.warnings,
    )  # fmt: skip
    return announced(result)


class _Found(NamedTuple):
    estimate: float
    stderr: float
    lower: float
    upper: float
    matvecs: int
    seconds: float
    warnings: tuple[str, ...] = ()


def _spectral(
    op: CurvatureOperator, num_matvecs: int, seed: int, max_seconds: float, progress: bool
) -> _Found:
    ends = bracket(op, num_matvecs, seed=seed, max_seconds=max_seconds, progress=progress)
    found = max(abs(ends.smallest), abs(ends.largest))
    lower = found * (1 - ROUNDINGS * roundoff(op.dtype))
    upper = max(-ends.smallest_bound, ends.largest_bound)
    return _Found(found, 0.0, lower, upper, ends.matvecs, ends.seconds, ends.warnings)


def _frobenius(
    op: CurvatureOperator, num_matvecs: int, seed: int, max_seconds: float, progress: bool
) -> _Found:
    A = UnitScale(op)
    with run_of_products(
        A, total=num_matvecs, max_seconds=max_seconds, progress=progress
    ) as products:
        if num_matvecs >= op.size:
            columns = torch.cat([_squares(products, E) for E in unit_vectors(products)])
            found = A.scale * float(on_host(products, columns)[0].sum()) ** 0.5
            return _Found(found, 0.0, found, found, op.size, products.seconds)
        deflated = _DeflatedSquares(products, num_matvecs, seed)
        stopped = taken(products, deflated.grow(), lambda: deflated.residuals)
        residuals, inside = on_host(products, torch.cat(deflated.residuals), deflated.inside)
    square = of_independent(residuals, float(inside))
    low, high = square.interval(0.95)
    found = square.value**0.5
    # d√x = dx / 2√x
    stderr = square.stderr / (2 * found) if found else 0.0
    rounding = unseen(op.dtype) * found
    return _Found(
        found * A.scale,
        max(stderr, rounding) * A.scale,
        (max(low, 0.0) ** 0.5 - rounding) * A.scale,
        (high**0.5 + rounding) * A.scale,
        products.matvecs,
        products.seconds,
        notes(stopped, products, num_matvecs),
    )


class _DeflatedSquares:
    """``‖A Q‖_F²`` for the range Q of a sketch, and samples of ``‖A (I - Q Qᵀ) g‖²``."""

    def __init__(self, products: Products, num_matvecs: int, seed: int) -> None:
        space = products.operator.space
        self._products = products
        self._num_matvecs = num_matvecs
        self._sketch, self._tests = (Probes(space, "rademacher", seed, i) for i in range(2))
        self.inside = torch.zeros((), dtype=torch.float64, device=space.device)
        self.residuals: list[Tensor] = []

    def grow(self) -> Iterator[None]:
        """Yields before every block of products; a sketch ends where time is over."""
        products, m = self._products, self._num_matvecs
        rank = max(0, min(m // 3, (m - 2) // 2))
        basis = OrthonormalColumns(products.operator.space, rank)
        for S in self._sketch.chunks(0, rank):
            if products.late:
                break
            yield
            basis.extend(products(S))
        for Q in basis.Q.split(WIDTH, dim=1):
            yield
            self.inside = self.inside + _squares(products, Q).sum()
        for G in self._tests.chunks(0, m - 2 * basis.size):
            yield
            self.residuals.append(_squares(products, basis.project_out(G)))


def _nuclear(
    op: CurvatureOperator, num_matvecs: int, seed: int, max_seconds: float, progress: bool
) -> _Found:
    if num_matvecs >= op.size:
        return _dense_nuclear(op, num_matvecs, seed, max_seconds, progress)
    steps = min(_STEPS, max(1, num_matvecs // 2))
    A = UnitScale(op)
    q = quadrature_of(
        A, num_matvecs // steps, steps, seed=seed, max_seconds=max_seconds, progress=progress
    )
    total = q.spectral_sum(torch.abs)
    low, high = total.confidence_interval(0.95)
    scale = max(map(abs, q.range))
    open_ = torch.stack([_open(rule, max(_KNOWN, q.noise) * scale) for rule in q.rules])
    beyond = op.size * (float(open_.mean()) + q.noise * scale)
    return _Found(
        total.estimate * A.scale,
        total.stderr * A.scale,
        max(0.0, low - beyond) * A.scale,
        (high + beyond) * A.scale,
        q.matvecs,
        q.seconds,
        q.warnings,
    )


def _dense_nuclear(
    op: CurvatureOperator, num_matvecs: int, seed: int, max_seconds: float, progress: bool
) -> _Found:
    A = UnitScale(op)
    with run_of_products(
        A, total=num_matvecs, max_seconds=max_seconds, progress=progress
    ) as products:
        columns = [products(E) for E in unit_vectors(products)]
        whole = op.space.gather(torch.cat(columns, dim=1))
        (dense,) = on_host(products, whole.to(small_dtype(products.dtype)))
        SymmetryWatch(products, seed).defect(dense)
    found = A.scale * float(torch.linalg.eigvalsh(dense).abs().sum())
    return _Found(found, 0.0, found, found, op.size, products.seconds)


def _open(rule: Rule, known: float) -> Tensor:
    """How far ``Σ w |θ|`` may be from the integral of |λ| that it is a Gauss quadrature of.

    Between two nodes, the two distribution functions differ by at most the weight of one of them
    (Chebyshev, Markov and Stieltjes; Szegő, Orthogonal polynomials, section 3.41); nodes with a
    residual of at most ``known`` are eigenvalues, that near. Where all nodes have one sign, |λ| is
    linear and there is no error.
    """
    nodes, weights, residuals = rule
    if float(nodes[0] - residuals[0]) >= 0 or float(nodes[-1] + residuals[-1]) <= 0:
        return weights.new_zeros(())
    loose = torch.where(residuals > known, weights, 0.0)
    between = nodes.diff() @ torch.maximum(loose[1:], loose[:-1])
    outside = loose[0] * residuals[0] + loose[-1] * residuals[-1]
    return between + outside + (weights - loose) @ residuals


def _squares(products: Products, X: Tensor) -> Tensor:
    """``‖A x‖²`` of every column, in double precision."""
    return products.norms(products(X)) ** 2


_NORMS = {2: _spectral, "fro": _frobenius, "nuc": _nuclear}
