"""Which eigenpairs are asked for: options refused before a product, sizes that fit in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import torch

from torchlinop.algorithms.given_operator import refuse_no_operator
from torchlinop.algorithms.krylov_schur import Target, Which
from torchlinop.algorithms.products import breakdown, roundoff, working_dtype
from torchlinop.algorithms.sizes import given, refuse_fractions, refuse_non_numbers
from torchlinop.choices import refuse_unknown
from torchlinop.errors import MemoryEstimateError, OptionError
from torchlinop.memory import free_bytes
from torchlinop.operators.base import CurvatureOperator

AUTO = 4  # columns that block_size="auto" times against one
AUTO_PRODUCTS = AUTO + 2  # which that takes


def target_of(
    op: CurvatureOperator,
    k: int,
    which: Which,
    tol: float | None,
    stored: torch.dtype | None = None,
) -> Target:
    """The pairs asked for, or what is wrong with asking.

    ``tol`` is 1e-6 in float64, 1e-4 in float32, two roundoffs of anything coarser that is
    involved, such as vectors that are ``stored`` so, unless given. Rounding alone leaves up to half
    of one, relative to ‖A‖, of which pairs with |λ| < ‖A‖ have to be a share.

    Raises:
        OptionError: no such k, which or tol.
    """
    refuse_no_operator(op)
    refuse_fractions(k=k)
    refuse_non_numbers(**given(tol=tol))
    if not 1 <= k <= op.size:
        raise OptionError(
            f"expected k from 1 to n = {op.size:,}, got {k}; for all eigenvalues of a small matrix "
            "take torch.linalg.eigh(op.to_dense())"
        )
    refuse_unknown("which", which, get_args(Which))
    if tol is not None and not 0 <= tol < 1:
        raise OptionError(f"expected tol from 0 to 1, relative to |λ|, got {tol}; leave it out")
    eps = torch.finfo(op.dtype).eps
    usual = max(1e-6 if eps < 1e-12 else 1e-4, 2 * eps, 2 * torch.finfo(stored or op.dtype).eps)
    return Target(k, which, usual if tol is None else tol, roundoff(op.dtype), breakdown(op.dtype))


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    ncv: int
    block_size: int
    products: int  # without those of the clean-up
    basis_dtype: torch.dtype
    basis_device: torch.device
    clean_up: bool  # by Rayleigh-Ritz on the eigenvectors
    bytes: int


@dataclass(frozen=True)
class Request:
    """The options of ``lanczos`` that sizes depend on."""

    op: CurvatureOperator
    k: int
    max_iter: int | None
    which: Which
    tol: float | None
    mode: str
    ncv: int | None
    block_size: int | str | None
    verify: bool
    basis_dtype: torch.dtype | None
    basis_device: torch.device | str | None

    @property
    def unrestarted(self) -> bool:
        """Whether this is a plain run, as it is without full reorthogonalisation."""
        return self.mode != "full"

    @property
    def working(self) -> torch.dtype:
        """The dtype of vectors."""
        return working_dtype(self.op.dtype)

    @property
    def coarse(self) -> bool:
        """Whether the basis has fewer digits than the vectors."""
        return self.basis_dtype not in (None, self.working)

    def refuse(self) -> None:
        """Raise OptionError if an option is not among its choices."""
        target_of(self.op, self.k, self.which, self.tol)
        refuse_fractions(**given(max_iter=self.max_iter, ncv=self.ncv))
        n, k = self.op.size, self.k
        if self.max_iter is not None and self.max_iter < self._least_products:
            raise OptionError(
                "expected max_iter, the budget of products, to be at least "
                f"{self._least_products} for k = {k}, got {self.max_iter}; take {10 * k}, say"
            )
        if self.ncv is not None and not min(k + 1, n) <= self.ncv <= n:
            raise OptionError(
                f"expected ncv from k + 1 = {k + 1} to n = {n:,}, got {self.ncv}; leave it out"
            )
        self._refuse_blocks()
        self._refuse_device()

    @property
    def _least_products(self) -> int:
        clean_up = self.k if self.verify or self.coarse else 0
        measurement = AUTO_PRODUCTS + AUTO if self.block_size == "auto" else 0
        block = self.block_size if isinstance(self.block_size, int) else 1
        return max(self.k, block) + clean_up + measurement

    def _refuse_blocks(self) -> None:
        b, storage = self.block_size, self.basis_dtype
        if storage is not None and not isinstance(storage, torch.dtype):
            raise OptionError(
                f"expected basis_dtype to be a torch.dtype, got {storage!r}; take torch.float16"
            )
        named = b == "auto" if isinstance(b, str) else b is None
        if not (named or (isinstance(b, int) and not isinstance(b, bool) and b >= 1)):
            raise OptionError(
                f'expected block_size to be at least 1, or "auto", got {b!r}; leave it out'
            )
        if storage and not (
            storage == self.working or (storage.is_floating_point and not self.working.is_complex)
        ):
            raise OptionError(
                f"expected basis_dtype to be a real floating-point dtype, or that of the vectors, "
                f"{self.working}, got {storage}; take torch.float16"
            )
        if self.unrestarted and (b not in (None, 1) or storage or self.basis_device):
            raise OptionError(
                f"reorthogonalize={self.mode!r} has no blocks and no other basis; leave out "
                'block_size, basis_dtype and basis_device, or take reorthogonalize="full"'
            )

    def _refuse_device(self) -> None:
        try:
            torch.empty(0, device=self.basis_device)
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise OptionError(
                f"expected basis_device to be a device that is here, got {self.basis_device!r}; "
                'take "cpu", or leave it out'
            ) from error

    def target(self) -> Target:
        """The pairs asked for."""
        return target_of(self.op, self.k, self.which, self.tol, self.basis_dtype)

    def plan(self, block_size: int) -> Plan:
        """The usual sizes, or the least where memory is short and ``ncv`` was not given.

        Raises:
            MemoryEstimateError: none fit into the memory that is free.
        """
        k = self.k
        # Blocks need room for several of them between restarts: with 34, not 21 vectors, k = 10
        # and blocks of 4, an eighth to three fifths of the products are saved.
        usual = self.ncv or max(2 * k + 1, 20, k + 6 * block_size)
        if self.unrestarted:
            usual = self.max_iter or max(6 * k, 60)
        # With k + max(4, 0.8 k) vectors, 15 to 40 percent more products.
        least = min(usual, k + max(4, math.ceil(0.8 * k)))
        sizes = (usual,) if self.ncv or self.unrestarted else (usual, least)
        plans = [self._plan(m, block_size) for m in sizes]
        free = free_bytes(plans[0].basis_device)
        for plan in plans:
            if not self.op.space.agree(plan.bytes > free):
                return plan
        raise MemoryEstimateError(self._too_much(plans[0], self._plan(least, block_size), free))

    def _plan(self, m: int, b: int) -> Plan:
        n, k = self.op.space.local_size, self.k
        m = min(self.op.size, max(m, k + b))
        clean_up = self.verify or self.coarse
        storage = self.basis_dtype or self.working
        device = torch.empty(0, device=self.basis_device or self.op.device).device
        total = (m + b) * n * storage.itemsize
        if device == self.op.device:  # the eigenvectors, the blocks, and what the clean-up takes
            total += ((4 if clean_up else 1) * k + 3 * b) * n * self.working.itemsize
        budget = (self.max_iter or 50 * m) - (k if clean_up else 0)
        return Plan(m, b, budget, storage, device, clean_up, total)

    def _too_much(self, asked: Plan, least: Plan, free: int) -> str:
        n, size = self.op.space.local_size, asked.basis_dtype.itemsize
        smaller = f"ncv={least.ncv} ({_gb(least.bytes)}), " if least.ncv < asked.ncv else ""
        return (
            f"k={self.k}, ncv={asked.ncv} needs {asked.bytes // max(1, n * size)} vectors x "
            f"{n:,} x {size} B = {_gb(asked.bytes)} on {asked.basis_device} ({_gb(free)} free). "
            f'Try {smaller}basis_device="cpu", basis_dtype=torch.bfloat16, or param_filter.'
        )


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
