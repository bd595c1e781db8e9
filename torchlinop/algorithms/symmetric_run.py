"""⟨A u, V⟩ = ⟨u, A V⟩ for vectors of two products that a run takes anyway: its test of symmetry."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from torchlinop.algorithms.products import Products, run_of_products, working_dtype
from torchlinop.algorithms.symmetry_watch import SymmetryWatch
from torchlinop.operators.base import CurvatureOperator


@contextmanager
def symmetric_run(
    op: CurvatureOperator,
    *,
    seed: int = 0,
    damping: float = 0.0,
    total: int | None = None,
    max_seconds: float = math.inf,
    progress: bool = False,
) -> Iterator[Products]:
    """``run_of_products`` of a matrix that must be symmetric, and of products that must repeat.

    Costs no product where it is, three inner products and the memory of two vectors until the
    second block of products. The check, of 6 products, is seeded by ``seed``.

    Raises:
        SymmetryError: it is not, or they do not; MemoryEstimateError: memory ran out.
    """
    watched = _Watched(op)
    with run_of_products(
        watched, damping=damping, total=total, max_seconds=max_seconds, progress=progress
    ) as products:
        watched.watch = SymmetryWatch(products, seed)
        yield products
        watched.judge()


class _Watched(CurvatureOperator):
    """A itself; of its first product, and its second, it compares the first columns."""

    def __init__(self, operator: CurvatureOperator) -> None:
        super().__init__(
            operator.space,
            layout=operator.layout,
            notes=operator.notes,
            positive_semidefinite=operator.positive_semidefinite,
        )
        self.operator = operator
        self.watch: SymmetryWatch | None = None
        self._first: tuple[Tensor, Tensor, Tensor] | None = None  # u, A u / unit, and the unit
        self._pair: Tensor | None = None  # ⟨u, A v⟩, ⟨v, A u⟩ and max ‖A x‖, for unit u and v
        self._compared = False

    def _matmat(self, V: Tensor) -> Tensor:
        self.judge()  # of products before: the device has them by now
        AV = self.operator.matmat(V)
        if not self._compared:
            self._compare(V[:, :1], AV[:, :1])
        return AV

    def _compare(self, v: Tensor, Av: Tensor) -> None:
        """Keep the first pair; of the second, what a comparison of both needs."""
        v, Av = (x.to(working_dtype(x.dtype)) for x in (v, Av))
        if self._first is None:
            size = self.space.largest_entry(Av)
            # Entries of size one, as squares of very small and large ones are lost in float32.
            unit = torch.where(size > 0, size, 1.0)
            self._first = v.clone(), Av / unit, unit
            return
        u, Au, unit = self._first
        Av, space = Av / unit, self.space
        lengths = torch.cat([space.norm(u), space.norm(v)])
        lengths = lengths.where(lengths > 0, 1.0)  # of columns that are zero
        size = (torch.cat([space.norm(Au), space.norm(Av)]) / lengths).max()
        forms = torch.cat([space.inner(u, Av), space.inner(v, Au)])[:, 0] / lengths.prod()
        self._pair = torch.cat([forms, size[None].to(forms.dtype)])
        self._first, self._compared = None, True

    def judge(self) -> None:
        """Hold what two products gave against each other, once; waits for the device then.

        Raises:
            NonFiniteError, SymmetryError: they are not those of a fixed symmetric matrix.
        """
        if self._pair is None or self.watch is None:
            return
        (uAv, vAu, size), self._pair = self._pair.cpu(), None
        zero = torch.zeros_like(uAv)
        H = torch.stack([torch.stack([zero, uAv]), torch.stack([vAu, zero])])
        self.watch.defect(H, float(size.real))

    def __repr__(self) -> str:
        return repr(self.operator)
