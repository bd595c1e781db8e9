"""A v_j = β_{j-1} v_{j-1} + α_j v_j + β_j v_{j+1}: a symmetric matrix made tridiagonal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchlinop.algorithms.basis import Basis, subtract
from torchlinop.algorithms.given_operator import refuse_no_operator, refuse_no_tensor
from torchlinop.algorithms.orthogonal import removed
from torchlinop.algorithms.products import Products, breakdown, working_dtype
from torchlinop.algorithms.reorthogonalization import Reorthogonalization, name_of, policy_of
from torchlinop.algorithms.result import Result
from torchlinop.algorithms.scaled_product import scaled_product
from torchlinop.algorithms.sizes import refuse_fractions
from torchlinop.algorithms.symmetric_run import symmetric_run
from torchlinop.errors import NonFiniteError, OptionError, VectorError
from torchlinop.operators.base import CurvatureOperator


@dataclass(frozen=True, eq=False)
class LanczosTridiag(Result):
    """``A V = V T + residual_norm v eᵀ`` with T tridiagonal, by ``iterations`` products."""

    alpha: Tensor  # (m,) float64, the diagonal of T
    beta: Tensor  # (m - 1,) float64, positive, beside it
    residual_norm: float  # β of the step that was not taken; 0 for an invariant subspace
    basis: Tensor | None  # (n, m), V
    matvecs: int
    reorthogonalize: str

    _columns: ClassVar[tuple[str, ...]] = ("alpha",)

    @property
    def iterations(self) -> int:
        """m, fewer than the steps asked for where the Krylov space became invariant."""
        return len(self.alpha)

    def matrix(self) -> Tensor:
        """T itself, (m, m)."""
        side = torch.diag(self.beta, 1)
        return torch.diag(self.alpha) + side + side.mT

    def __repr__(self) -> str:
        return (
            f"LanczosTridiag  {self.iterations} steps | {self.matvecs} matvecs | "
            f"reorthogonalize={self.reorthogonalize!r} | residual {self.residual_norm:.1e} | "
            f"basis {'kept' if self.basis is not None else 'not kept'}"
        )


def lanczos_tridiagonal(
    op: CurvatureOperator,
    v0: Tensor,
    steps: int,
    *,
    reorthogonalize: Reorthogonalization = True,
    keep_basis: bool = True,
) -> LanczosTridiag:
    """Take ``steps`` Lanczos steps from ``v0``, fewer if its Krylov space is smaller.

    ``reorthogonalize`` is ``"full"`` or True (T and V as in exact arithmetic), ``"partial"``
    (orthogonal to half of the digits, for a fraction of the inner products, with one host
    synchronisation a step), ``"local"`` (the last five vectors) or ``"none"`` or False: with the
    latter two, eigenvalues of T come in copies. Without a basis (``keep_basis=False``, and only
    with ``"none"``) four vectors are held, else ``steps + 3``; two more until the second product.

    Raises:
        VectorError: v0 does not fit or is zero; OptionError: an unknown mode, or steps below 1.
        NonFiniteError, SymmetryError: the products are not those of a fixed symmetric matrix.
    """
    mode = name_of(reorthogonalize)
    refuse_no_operator(op)
    refuse_fractions(steps=steps)
    if steps < 1:
        raise OptionError(f"expected steps to be at least 1, got {steps}; take 50, say")
    if not keep_basis and mode != "none":
        raise OptionError(
            f"reorthogonalize={mode!r} needs the basis; "
            'pass keep_basis=True, or reorthogonalize="none"'
        )
    q = start_vector(op, v0)
    with symmetric_run(op) as products:
        recurrence = Recurrence(products, q, min(steps, op.size), mode, keep_basis)
        recurrence.run()
        return recurrence.result()


def start_vector(op: CurvatureOperator, v0: Tensor) -> Tensor:
    """v0 as a unit column (n, 1) in working precision.

    Raises:
        VectorError: it has another shape, dtype or device, is zero or is not finite.
    """
    refuse_no_tensor("v0", v0)
    working = working_dtype(op.dtype)
    rows = op.space.local_size
    if v0.shape != (rows,) or v0.dtype not in (op.dtype, working) or v0.device != op.device:
        raise VectorError(
            f"expected v0 of shape ({rows},) in {op.dtype} on {op.device}, got "
            f"{tuple(v0.shape)} in {v0.dtype} on {v0.device}; pass op.space.random(1)[:, 0]"
        )
    q = v0.detach().to(working, copy=True)[:, None]
    norm = float(op.space.norm(q)[0])
    if not 0 < norm < float("inf"):
        raise VectorError(f"expected a finite v0 other than zero, got norm {norm}; leave it out")
    return q.div_(norm)


class Recurrence:
    """The recurrence of one run. Columns and coefficients stay on the device."""

    def __init__(
        self, products: Products, q: Tensor, steps: int, mode: str, keep_basis: bool
    ) -> None:
        self.products, self.mode, self.steps, self.keep_basis = products, mode, steps, keep_basis
        self.space = products.operator.space
        self.breakdown = breakdown(products.operator.dtype)
        self.policy = policy_of(mode, products.operator.dtype)
        capacity = steps + 1 if keep_basis else 0
        self.basis = Basis(self.space, q, capacity, dtype=None, device=None)
        self.alpha, self.beta, self.errors = torch.zeros(
            3, steps, dtype=torch.float64, device=q.device
        )
        self.scale = torch.zeros((), dtype=torch.float64, device=q.device)
        self.previous, self.q = q[:, :0], self._stored(0, q)

    def _room(self, j: int) -> Tensor:
        """Memory for the column j: contiguous, so that it has the same bits without a basis."""
        return self.basis.room(j, 1) if self.keep_basis else self.q.new_empty(1, len(self.q)).mT

    def _stored(self, j: int, q: Tensor) -> Tensor:
        return self.basis.put(j, q) if self.keep_basis else q

    def run(self) -> None:
        """All steps, or until an invariant subspace is found, looking for it log(m) times."""
        for j in range(self.steps):
            self.step(j)
            if j & (j + 1) == 0 and bool((self.beta[: j + 1] == 0).any()):
                return

    def step(self, j: int) -> None:
        """One product."""
        w = self._room(j + 1)
        s = scaled_product(self.products, self.q, self.scale if j else None, w)
        if j:
            subtract(w, self.previous, self.beta[j - 1 : j, None] / s)
        self.alpha[j] = s * removed(self.space, self.q, w)[0, 0].real
        self.scale = torch.maximum(self.scale, self.alpha[j].abs())
        alpha, beta, threshold = (
            x / s for x in (self.alpha[: j + 1], self.beta[:j], self.breakdown * self.scale)
        )
        length, unknown = self.policy(w, self.basis, alpha, beta, threshold)
        self.errors[j] = s * unknown  # to the coefficients
        self.beta[j] = s * length
        self.scale = torch.maximum(self.scale, self.beta[j])
        self.previous, self.q = self.q, self._stored(j + 1, w)

    def result(self) -> LanczosTridiag:
        """What was found, up to the first β that is zero."""
        alpha, beta = self.alpha.cpu(), self.beta.cpu()
        m = min(self.products.matvecs, self.steps)
        zeros = (beta[:m] == 0).nonzero()
        m = int(zeros[0]) + 1 if len(zeros) else m
        if not bool(torch.isfinite(alpha[:m]).all()):
            raise NonFiniteError(
                f"a product of {self.products.operator!r} is NaN or infinite, in the first "
                f"{self.products.matvecs} products; op.check() says more"
            )
        return LanczosTridiag(
            alpha[:m],
            beta[: m - 1],
            float(beta[m - 1]),
            self.basis.columns(0, m) if self.keep_basis else None,
            self.products.matvecs,
            self.mode,
        )
