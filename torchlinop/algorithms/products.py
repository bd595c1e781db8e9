"""The products of one run, ``V ↦ (A + damping I) V``: in working precision, counted, in time."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from torchlinop.algorithms.sizes import refuse_run
from torchlinop.errors import MemoryEstimateError, NonFiniteError
from torchlinop.model_state import full_precision
from torchlinop.operators.base import CurvatureOperator
from torchlinop.progress import products_shown

log = logging.getLogger("torchlinop")


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a solver's vectors: that of the operator, and float32 at least.

    The vectors of a recurrence lose everything if rounded to half precision: those of a bfloat16
    operator are kept in float32 and rounded on their way into a product only.
    """
    return torch.promote_types(dtype, torch.float32)


def roundoff(dtype: torch.dtype) -> float:
    """What products of this dtype are off by, relative to ‖A‖.

    Half precision rounds every entry by up to eps / 2; the errors of many entries average.
    """
    return max(torch.finfo(working_dtype(dtype)).eps, torch.finfo(dtype).eps / 16)


# What is left unseen of a residual, in roundoffs of ‖A‖: products round, and so do combinations of
# them. Measured on the test spectra: with 2, one claim in four is too small, by up to 1.9.
ROUNDING = 5.0


def breakdown(dtype: torch.dtype) -> float:
    """A residual of this length, relative to ‖A‖, is rounding error and no direction."""
    return max(50 * torch.finfo(working_dtype(dtype)).eps, 2 * roundoff(dtype))


def multiply(op: CurvatureOperator, V: Tensor) -> Tensor:
    """A V (n, k) in the dtype of V, which may be finer than that of the operator."""
    return op.matmat(V.to(op.dtype)).to(V.dtype)


class Products:
    """``V ↦ (A + damping I) V`` for blocks in working precision, of an operator of any dtype."""

    def __init__(
        self,
        operator: CurvatureOperator,
        *,
        damping: float = 0.0,
        max_seconds: float = math.inf,
        notify: Callable[[int], object] = lambda columns: None,
    ) -> None:
        refuse_run(damping, max_seconds)
        self.operator = operator
        self.damping = damping
        self.dtype = working_dtype(operator.dtype)
        if self.dtype != operator.dtype:
            log.info("vectors of the solver are in %s, products in %s", self.dtype, operator.dtype)
        self.noise = breakdown(operator.dtype)  # what products do to eigenvalues, relative to ‖A‖
        self.matvecs = 0
        self.matmats = 0
        self.started = time.perf_counter()
        self._max_seconds = max_seconds
        self._notify = notify

    def __call__(self, V: Tensor) -> Tensor:
        """``A V + damping V`` (n, w), in memory of its own."""
        AV = multiply(self.operator, V)
        self.count(V.shape[1])
        return AV.add_(V, alpha=self.damping) if self.damping else AV

    def columns(self, V: Tensor) -> Tensor:
        """The same with contiguous columns, as a basis stores them."""
        rows = self(V).mT.contiguous()
        # The strides of a single row are arbitrary, and copies are slow by some: a view sets them.
        return rows.view(rows.shape).mT

    def count(self, columns: int, calls: int = 1) -> None:
        """Note products taken elsewhere."""
        self.matvecs += columns
        self.matmats += calls
        self._notify(columns)

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.perf_counter() - self.started

    @property
    def late(self) -> bool:
        """Whether the time of this run is over. Never before the first product."""
        if self.matvecs == 0 or math.isinf(self._max_seconds):
            return False
        return self.operator.space.agree(self.seconds > self._max_seconds)

    def dots(self, X: Tensor, Y: Tensor) -> Tensor:
        """``⟨x_i, y_i⟩`` of every column, (k,)."""
        return self.operator.space.dots(X, Y).real

    def norms(self, X: Tensor) -> Tensor:
        """``‖x_i‖`` of every column, (k,)."""
        return self.operator.space.norm(X)

    def refuse_non_finite(self, *small: Tensor) -> None:
        """Raise NonFiniteError if NaN or infinity has come into these, by products of A."""
        if not all(bool(torch.isfinite(tensor).all()) for tensor in small):
            raise NonFiniteError(
                f"the products of {self.operator!r} hold NaN or infinity, by product "
                f"{self.matvecs}; look for them in the data and the parameters, or call op.check()"
            )


@contextmanager
def run_of_products(
    operator: CurvatureOperator,
    *,
    damping: float = 0.0,
    total: int | None = None,
    max_seconds: float = math.inf,
    progress: bool = False,
) -> Iterator[Products]:
    """The products of one run: with a bar on a terminal, and a name for running out of memory.

    Autocast is off inside: inner products are as accurate as their vectors.

    Raises:
        MemoryEstimateError: memory ran out; which says after how many products.
    """
    with (
        operator.space.interruptible(),
        full_precision(operator.device),
        products_shown(progress, total) as notify,
    ):
        products = Products(operator, damping=damping, max_seconds=max_seconds, notify=notify)
        try:
            yield products
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            raise MemoryEstimateError(
                f"memory on {operator.device} ran out in product {products.matvecs + 1} of "
                f"{operator!r}, or right after it; ask for fewer vectors at once (ncv, block_size, "
                "num_probes), or pass a smaller microbatch_size to the operator"
            ) from error


def _out_of_memory(error: RuntimeError) -> bool:
    # On the CPU, torch has no class of its own for it.
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
