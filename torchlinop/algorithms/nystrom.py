"""A ≈ U Λ U^T + s (I − U U^T), where U Λ U^T = (A Ω) (Ω^T A Ω)⁺ (A Ω)^T, for A ≥ 0."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchlinop.algorithms.basis import small_dtype
from torchlinop.algorithms.extremal import extremal_eigenvalues
from torchlinop.algorithms.given_operator import refuse_no_operator
from torchlinop.algorithms.gram_schmidt import OrthonormalColumns
from torchlinop.algorithms.probes import checked_seed, on_host
from torchlinop.algorithms.products import roundoff, run_of_products
from torchlinop.algorithms.sizes import given, refuse_fractions, refuse_non_numbers
from torchlinop.algorithms.starting_block import starting_block
from torchlinop.errors import DefinitenessError, OptionError
from torchlinop.operators.base import CurvatureOperator

_LOOKS = 10  # Lanczos steps in search of a negative eigenvalue
_NOISE = 1000  # roundings in a product, as of a network in float32,
_LARGEST_NOISE = 0.05  # but for very coarse dtypes


class NystromOperator(CurvatureOperator):
    """``U diag(λ) U^T + s (I − U U^T)``: few eigenpairs, and one value for all that is left."""

    def __init__(
        self, operator: CurvatureOperator, U: Tensor, eigenvalues: Tensor, beyond: float
    ) -> None:
        description = f"rank {len(eigenvalues)} and {beyond:.3g} beyond, of {operator!r}"
        super().__init__(
            operator.space,
            layout=operator.layout,
            description=[description],
            positive_semidefinite=beyond >= 0 and bool((eigenvalues >= 0).all()),
        )
        self.U = U  # (n, r) orthonormal
        self.eigenvalues = eigenvalues  # (r,) float64, descending
        self.beyond = beyond  # s
        self._operator = operator

    def inverse(self, damping: float) -> NystromOperator:
        """``(this + damping I)⁻¹``, positive definite.

        As a preconditioner of A + damping I, with s the smallest eigenvalue kept, it leaves an
        expected condition number below 28 once the rank is about three times the effective
        dimension (Frangella, Tropp and Udell, SIAM J. Matrix Anal. Appl. 44, 2023, theorem 1.1).

        Raises:
            OptionError: no positive definite inverse exists.
        """
        least = min([self.beyond, *self.eigenvalues.tolist()[-1:]])
        if not 0 < least + damping < math.inf:
            raise OptionError(
                f"expected a finite damping above {-least:.3g}, for a positive definite inverse, "
                f"got {damping}; raise the damping"
            )
        values, beyond = 1 / (self.eigenvalues + damping), 1 / (self.beyond + damping)
        return NystromOperator(self._operator, self.U, values, beyond)

    def _matmat(self, V: Tensor) -> Tensor:
        W = V.to(self.U.dtype)
        C = self.space.inner(self.U, W)
        C *= (self.eigenvalues - self.beyond).to(C.device)[:, None]
        return (self.beyond * W).addmm_(self.U, C.to(W.dtype)).to(V.dtype)


def nystrom(
    op: CurvatureOperator, rank: int = 20, *, shift: float | None = None, seed: int = 0
) -> NystromOperator:
    """A positive semidefinite A from its products with ``rank`` random columns.

    Tropp, Yurtsever, Udell and Cevher, Fixed-rank approximation of a positive-semidefinite matrix
    from streaming data, 2017, algorithm 3. U Λ U^T is never above A; its error is that of the best
    approximation of a smaller rank, up to a factor. With ``shift=0`` it is exact if A
    has no larger rank. Fewer eigenpairs come back where A, or rounding, leaves no more.

    Costs ``rank`` products in one call, 10 Lanczos steps in search of a negative eigenvalue, and
    3 rank vectors of memory. One that is small against ‖A‖, or not seen by either, goes unnoticed:
    what comes back is positive semidefinite whatever A is.

    Args:
        op: A ≥ 0, a GGN or a Fisher matrix say.
        rank: the number of columns.
        shift: s, which stands for the eigenvalues not found; unless given, the smallest found if
            there are ``rank`` of them, else 0. Pass 0 for the plain approximation of A.
        seed: of the columns.

    Raises:
        OptionError: rank, shift or seed do not fit.
        DefinitenessError: A has a negative eigenvalue; NonFiniteError: products are not finite.
    """
    _refuse(op, rank, shift)
    seed = checked_seed(seed)
    _refuse_negative(op, seed)
    space, eps = op.space, roundoff(op.dtype)
    Omega = starting_block(op, None, rank, seed)
    with run_of_products(op) as products:
        Y = products.columns(Omega)
        basis = OrthonormalColumns(space, rank)
        R, W, H = on_host(
            products, basis.extend(Y), space.inner(basis.Q, Omega), space.inner(Omega, Y)
        )
    H = (H + H.mT) / 2
    ritz_values = torch.linalg.eigvalsh(H)
    _refuse_below(op, float(ritz_values[0]), float(R.norm()))
    # (A + ν I) Ω = Q (R + ν W), but for what of ν Ω is not in the range of A Ω, of rounding's size.
    nu = max(eps * float(R.norm()), -2 * float(ritz_values[0]))
    eigenvalues, V = torch.linalg.eigh(H + nu * torch.eye(rank, dtype=H.dtype))
    root = V / eigenvalues.clamp_min(torch.finfo(H.dtype).tiny).sqrt()
    U, sigma, _ = torch.linalg.svd((R + nu * W) @ root, full_matrices=False)
    values = (sigma**2 - nu).clamp_min(0)
    kept = values > 2 * nu
    U = basis.Q @ U[:, kept].to(device=op.device, dtype=basis.Q.dtype)
    values = values[kept].to(small_dtype(H.dtype))
    if shift is None:
        shift = float(values[-1]) if len(values) == rank else 0.0
    return NystromOperator(op, U, values, shift)


def _refuse(op: CurvatureOperator, rank: int, shift: float | None) -> None:
    refuse_no_operator(op)
    refuse_fractions(rank=rank)
    refuse_non_numbers(**given(shift=shift))
    if not 1 <= rank <= op.size:
        raise OptionError(f"expected rank from 1 to n = {op.size:,}, got {rank}; take 20, say")
    if shift is not None and not 0 <= shift < math.inf:
        raise OptionError(
            f"expected shift to be finite and at least 0, got {shift}; leave it out for the "
            "smallest eigenvalue found"
        )
    if op.dtype.is_complex:
        raise OptionError(
            f"expected a real operator, got {op!r}; take randomized_eigh for a complex one"
        )


def _refuse_negative(op: CurvatureOperator, seed: int) -> None:
    ends = extremal_eigenvalues(op, min(_LOOKS, op.size), seed=seed)
    _refuse_below(op, ends.smallest, max(ends.largest, -ends.smallest))


def _refuse_below(op: CurvatureOperator, lowest: float, scale: float) -> None:
    noise = min(_NOISE * torch.finfo(op.dtype).eps, _LARGEST_NOISE)
    if lowest < -noise * scale:
        raise DefinitenessError(
            f"a vector x with xᵀAx = {lowest:.2g} xᵀx was met in {op!r}: expected no negative "
            "eigenvalue. Take randomized_eigh, or a GGNOperator in place of a Hessian"
        )
