"""diag A = E[ω ⊙ A ω], and of that only what a sketched subspace leaves: XDiag."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from torchlinop.algorithms.basis import inner
from torchlinop.algorithms.leave_one_out import drop, without_direction
from torchlinop.algorithms.probes import (
    Probes,
    forms,
    on_host,
    real_part,
    refuse_num_matvecs,
    refuse_seed,
    unit_vectors,
)
from torchlinop.algorithms.products import multiply
from torchlinop.algorithms.result import Result
from torchlinop.algorithms.sketched_range import (
    SketchedRange,
    columns_dot,
    normals,
    refuse_asymmetric,
)
from torchlinop.errors import OptionError
from torchlinop.operators.base import CurvatureOperator

DiagonalMethod = Literal["xdiag", "hutchinson"]

_ENTRIES = 2**22  # of temporary memory


@dataclass(frozen=True, repr=False)
class DiagonalResult(Result):
    """An estimate of the diagonal of A, entry by entry."""

    estimate: Tensor  # (n,)
    stderr: Tensor  # (n,) one standard error; 0 where the diagonal is exact
    method: str
    matvecs: int
    seed: int
    dtype: torch.dtype
    seconds: float

    _columns: ClassVar[tuple[str, ...]] = ("estimate", "stderr")

    def __repr__(self) -> str:
        size = float(self.estimate.double().norm())
        error = float(self.stderr.double().norm())
        relative = f"{error / size:.1e}" if size else "0"
        return (
            f"DiagonalResult  {len(self.estimate):,} entries, 2-norm {size:.4g} | estimated error "
            f"{relative} of it | {self.method} | {self.matvecs:,} matvecs | seed {self.seed}"
        )

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
) -> DiagonalResult:
    """Estimate the diagonal of A from products with Rademacher probes; exact if n are granted.

    ``"xdiag"`` (Epperly, Tropp, Webber, SIAM J. Matrix Anal. Appl. 45, 2024) is the more accurate,
    the faster the eigenvalues decay, and keeps 1.5 vectors a product; beside its products it takes
    about n num_matvecs³ / 2 operations, for jackknife standard errors. ``"hutchinson"`` (Bekas,
    Kokiopoulou, Saad, Applied Numerical Mathematics 57, 2007) keeps two vectors.

    Of a Hermitian operator, the real part is used, which has the same diagonal.

    Raises:
        OptionError: an unknown option, or fewer products than the method needs (4 and 2).
        NonFiniteError: a product holds NaN or infinity; SymmetryError: A is not symmetric.
    """
    start = time.perf_counter()
    refuse_num_matvecs(num_matvecs)
    refuse_seed(seed)
    if method not in get_args(DiagonalMethod):
        raise OptionError(
            f"unknown method {method!r}; choose one of {', '.join(get_args(DiagonalMethod))}"
        )
    A = real_part(op)
    exact = num_matvecs >= A.size
    estimator = _exact if exact else {"xdiag": _xdiag, "hutchinson": _hutchinson}[method]
    estimate, stderr, matvecs = estimator(A, num_matvecs, seed)
    on_host(A, A.space.norm(estimate)[None])
    if not exact:  # what no probe can see is the rounding of the products
        stderr = torch.maximum(stderr, torch.finfo(A.dtype).eps * estimate.abs())
    return DiagonalResult(
        estimate,
        stderr,
        "exact" if exact else method,
        matvecs,
        seed,
        op.dtype,
        time.perf_counter() - start,
    )


def _exact(op: CurvatureOperator, num_matvecs: int, seed: int) -> tuple[Tensor, Tensor, int]:
    entries = torch.cat([forms(op, E) for E in unit_vectors(op.space)]).to(op.dtype)
    return entries, torch.zeros_like(entries), op.size


def _hutchinson(op: CurvatureOperator, num_matvecs: int, seed: int) -> tuple[Tensor, Tensor, int]:
    """Mean and spread of ω ⊙ A ω, updated chunk by chunk (Chan, Golub, LeVeque 1983)."""
    if num_matvecs < 2:
        raise OptionError(
            'expected num_matvecs to be at least 2 for method="hutchinson", got '
            f"{num_matvecs}; a standard error needs two samples"
        )
    count = 0
    mean = squares = torch.zeros(())
    for Omega in Probes(op.space, "rademacher", seed, 0).chunks(0, num_matvecs):
        samples = Omega * multiply(op, Omega)
        k = samples.shape[1]
        own = samples.mean(1)
        spread = (samples - own[:, None]).square().sum(1)
        if count:
            difference = own - mean
            mean = mean + difference * (k / (count + k))
            squares = squares + spread + difference.square() * (count * k / (count + k))
        else:
            mean, squares = own, spread
        count += k
    return mean, (squares / (count * (count - 1))).sqrt(), count


def _xdiag(op: CurvatureOperator, num_matvecs: int, seed: int) -> tuple[Tensor, Tensor, int]:
    """Mean over i of ``diag(P_i A) + ω_i ⊙ (I - P_i) A ω_i`` with P_i = Q (I - s_i s_iᵀ) Qᵀ."""
    k = num_matvecs // 2
    if k < 2:
        raise OptionError(
            f'expected num_matvecs to be at least 4 for method="xdiag", got {num_matvecs}; '
            'raise it, or use method="hutchinson"'
        )
    sketch = SketchedRange(op, "rademacher", seed)
    sketch.grow(k)
    Q, Omega = sketch.Q, sketch.Omega
    Z = multiply(op, Q)
    R, T = on_host(op, sketch.R, inner(op.space, Z, Omega))
    refuse_asymmetric(op, R, T)
    S = normals(R)
    estimate, stderr = Q.new_empty(2, len(Q))
    # Rows are independent of each other.
    for part in torch.arange(len(Q)).split(max(1, _ENTRIES // k)):
        rows = slice(int(part[0]), int(part[-1]) + 1)
        estimate[rows], stderr[rows] = _jackknifed_rows(Q[rows], Z[rows], Omega[rows], S, T)
    return estimate, stderr, 2 * k


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
