"""diag A = E[ω ⊙ A ω], and of that only what a sketched subspace leaves: XDiag."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from torchlinop.algorithms.early_stop import announced, notes, taken
from torchlinop.algorithms.hutchinson import unseen
from torchlinop.algorithms.leave_one_out import drop, without_direction
from torchlinop.algorithms.probes import (
    Probes,
    checked_seed,
    forms,
    on_host,
    real_part,
    refuse_num_matvecs,
    unit_vectors,
)
from torchlinop.algorithms.products import Products, run_of_products
from torchlinop.algorithms.result import Result
from torchlinop.algorithms.sketched_range import (
    RangeAndImage,
    columns_dot,
    normals,
    refuse_asymmetric,
)
from torchlinop.algorithms.symmetry_watch import SymmetryWatch
from torchlinop.algorithms.unit_scale import UnitScale
from torchlinop.choices import refuse_unknown
from torchlinop.errors import OptionError
from torchlinop.operators.base import CurvatureOperator

DiagonalMethod = Literal["xdiag", "hutchinson"]

_ENTRIES = 2**22  # of temporary memory


@dataclass(frozen=True, repr=False, eq=False)
class DiagonalResult(Result):
    """An estimate of the diagonal of A, entry by entry."""

    estimate: Tensor  # (n,)
    stderr: Tensor  # (n,) one standard error; 0 where the diagonal is exact
    method: str
    matvecs: int
    seed: int
    dtype: torch.dtype
    seconds: float
    warnings: tuple[str, ...] = ()

    _columns: ClassVar[tuple[str, ...]] = ("estimate", "stderr")

    def __repr__(self) -> str:
        size = float(self.estimate.double().norm())
        error = float(self.stderr.double().norm())
        relative = f"{error / size:.1e}" if size else "0"
        line = (
            f"DiagonalResult  {len(self.estimate):,} entries, 2-norm {size:.4g} | estimated error "
            f"{relative} of it | {self.method} | {self.matvecs:,} matvecs | seed {self.seed}"
        )
        return "\n".join([line, *(f"  {warning}" for warning in self.warnings)])

    def scalars(self) -> dict[str, float]:
        """Numbers for a logger: not the entries."""
        return {
            "matvecs": float(self.matvecs),
            "norm": float(self.estimate.double().norm()),
            "error": float(self.stderr.double().norm()),
        }


def diagonal(
    op: CurvatureOperator,
    num_matvecs: int = 60,
    *,
    method: DiagonalMethod = "xdiag",
    seed: int = 0,
    max_seconds: float = math.inf,
    progress: bool = False,
) -> DiagonalResult:
    """Estimate the diagonal of A from products with Rademacher probes; exact if n are granted.

    ``"xdiag"`` (Epperly, Tropp, Webber, SIAM J. Matrix Anal. Appl. 45, 2024) is the more accurate,
    the faster the eigenvalues decay, and keeps 1.5 vectors a product; beside its products it takes
    about n num_matvecs³ / 2 operations, for jackknife standard errors. ``"hutchinson"`` (Bekas,
    Kokiopoulou, Saad, Applied Numerical Mathematics 57, 2007) keeps two vectors.

    Of a Hermitian operator, the real part is used, which has the same diagonal. Ctrl-C, or
    ``max_seconds``, returns the estimate from the blocks of 16 probes that are complete, if there
    is one; ``progress`` shows a bar on a terminal.

    Raises:
        OptionError: an unknown option, or fewer products than the method needs (4 and 2).
        NonFiniteError: a product holds NaN or infinity; SymmetryError: A is not symmetric.
        NotConvergedError: time was over before n products, of which the exact diagonal is made.
    """
    refuse_num_matvecs(num_matvecs)
    seed = checked_seed(seed)
    refuse_unknown("method", method, get_args(DiagonalMethod))
    A = UnitScale(real_part(op))
    exact = num_matvecs >= A.size
    estimator = _exact if exact else {"xdiag": _xdiag, "hutchinson": _hutchinson}[method]
    with run_of_products(
        A, total=num_matvecs, max_seconds=max_seconds, progress=progress
    ) as products:
        found = estimator(products, num_matvecs, seed)
        on_host(products, A.space.norm(found.estimate)[None])
    stderr = found.stderr
    if not exact:
        stderr = torch.maximum(stderr, unseen(A.dtype) * found.estimate.abs())
    result = DiagonalResult(
        found.estimate * A.scale,
        stderr * A.scale,
        "exact" if exact else method,
        products.matvecs,
        seed,
        op.dtype,
        products.seconds,
        notes(found.stopped, products, num_matvecs),
    )
    return announced(result)


class _Found(NamedTuple):
    estimate: Tensor  # (n,)
    stderr: Tensor  # (n,)
    stopped: str = ""  # why, before all products were spent


def _exact(products: Products, num_matvecs: int, seed: int) -> _Found:
    entries = torch.cat([forms(products, E) for E in unit_vectors(products)])
    entries = products.operator.space.scatter(entries.to(products.operator.dtype))
    return _Found(entries, torch.zeros_like(entries))


def _hutchinson(products: Products, num_matvecs: int, seed: int) -> _Found:
    if num_matvecs < 2:
        raise OptionError(
            'expected num_matvecs to be at least 2 for method="hutchinson", got '
            f"{num_matvecs}; a standard error needs two samples"
        )
    moments = _Moments()
    blocks = moments.grow(
        products, Probes(products.operator.space, "rademacher", seed, 0), num_matvecs
    )
    stopped = taken(products, blocks, lambda: moments.count)
    return _Found(moments.mean, moments.stderr, stopped)


class _Moments:
    """Mean and spread of ω ⊙ A ω, updated block by block (Chan, Golub, LeVeque 1983)."""

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, torch.zeros(()), torch.zeros(())

    @property
    def stderr(self) -> Tensor:
        """Of the mean, (n,)."""
        return (self._squares / (self.count * (self.count - 1))).sqrt()

    def grow(self, products: Products, probes: Probes, count: int) -> Iterator[None]:
        """Take so many samples in all; yields before every block of them."""
        for Omega in probes.chunks(self.count, count):
            yield
            samples = Omega * products(Omega)
            k = samples.shape[1]
            own = samples.mean(1)
            spread = (samples - own[:, None]).square().sum(1)
            difference, weight = own - self.mean, self.count / (self.count + k)
            self.mean, self._squares, self.count = (
                self.mean + difference * (1 - weight),
                self._squares + spread + difference.square() * (k * weight),
                self.count + k,
            )


def _xdiag(products: Products, num_matvecs: int, seed: int) -> _Found:
    """Mean over i of ``diag(P_i A) + ω_i ⊙ (I - P_i) A ω_i`` with P_i = Q (I - s_i s_iᵀ) Qᵀ."""
    if num_matvecs < 4:
        raise OptionError(
            f'expected num_matvecs to be at least 4 for method="xdiag", got {num_matvecs}; '
            'raise it, or use method="hutchinson"'
        )
    sketch = RangeAndImage(products, "rademacher", seed)
    stopped = taken(products, sketch.grow(num_matvecs // 2), lambda: sketch.size)
    Q, Z, Omega = sketch.Q, sketch.Z, sketch.Omega
    R, T = on_host(products, sketch.R, products.operator.space.inner(Z, Omega))
    refuse_asymmetric(SymmetryWatch(products, seed), R, T)
    S = normals(R)
    estimate, stderr = Q.new_empty(2, len(Q))
    # Rows are independent of each other.
    chunk = max(1, _ENTRIES // sketch.size)
    for start in range(0, len(Q), chunk):
        rows = slice(start, start + chunk)
        estimate[rows], stderr[rows] = _jackknifed_rows(Q[rows], Z[rows], Omega[rows], S, T)
    return _Found(estimate, stderr, stopped)


def _jackknifed_rows(
    Q: Tensor, Z: Tensor, Omega: Tensor, S: Tensor, T: Tensor
) -> tuple[Tensor, Tensor]:
    k = S.shape[1]
    captured = (Q * Z).sum(1)
    estimate = captured + _left_out(Q, Z, Omega, S, T)
    differences = []
    for i in range(k):
        s = S[:, i : i + 1]
        along = ((Q @ s.to(Q)) * (Z @ s.to(Z)))[:, 0]
        others = _left_out(Q, Z, drop(Omega, i), without_direction(S, i), drop(T, i))
        differences.append(captured - along + others - estimate)
    spread = torch.stack(differences).std(0, correction=0)
    return estimate, spread * (k - 1) ** 0.5


def _left_out(Q: Tensor, Z: Tensor, Omega: Tensor, S: Tensor, T: Tensor) -> Tensor:
    """Mean over i of ``ω_i ⊙ Q s_i (s_iᵀ QᵀAω_i) - (Q s_i) ⊙ (A Q s_i)``."""
    QS, ZS = Q @ S.to(Q), Z @ S.to(Z)
    return (QS * (Omega * columns_dot(S, T).to(Q) - ZS)).mean(1)
