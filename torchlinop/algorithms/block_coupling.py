"""‖(A v)_b − A_bb v_b‖² against ‖(A v)_b‖²: how much of a matrix its diagonal blocks leave out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchlinop.algorithms.given_operator import refuse_no_operator
from torchlinop.algorithms.probes import checked_seed
from torchlinop.algorithms.products import multiply, run_of_products
from torchlinop.algorithms.result import Result
from torchlinop.algorithms.sizes import refuse_fractions
from torchlinop.algorithms.student import student_quantile
from torchlinop.errors import OptionError
from torchlinop.operators.base import CurvatureOperator
from torchlinop.operators.blocks import BlockDiagonalOperator, columns_that_fit
from torchlinop.operators.grouping import Grouping
from torchlinop.space import Distribution

_SHOWN = 10  # blocks in a repr
_CHANCE = 1e-3  # of naming some block of a linear map, of many entries


@dataclass(frozen=True, repr=False, eq=False)
class BlockCoupling(Result):
    """For every block b, the rows ``f = (A v)_b`` of a product against ``k = A_bb v_b``.

    All tensors are float64, on the CPU.
    """

    names: tuple[str, ...]  # (num_blocks,)
    relative_error: Tensor  # (num_blocks,) √(E‖f − k‖² / E‖f‖²): 0 where A is block diagonal
    relative_error_stderr: Tensor  # (num_blocks,)
    cosine: Tensor  # (num_blocks,) E⟨f, k⟩ / √(E‖f‖² E‖k‖²): 1 where A is block diagonal
    cosine_stderr: Tensor  # (num_blocks,)
    defect: Tensor  # (num_blocks,) relative_error² + cosine² − 1: 0 for a linear map
    defect_stderr: Tensor  # (num_blocks,)
    num_probes: int
    matvecs: int
    distribution: str
    seed: int
    seconds: float

    _columns: ClassVar[tuple[str, ...]] = (
        "names",
        "relative_error",
        "relative_error_stderr",
        "cosine",
        "cosine_stderr",
        "defect",
        "defect_stderr",
    )

    @property
    def nonlinear(self) -> tuple[str, ...]:
        """The blocks whose defect is beyond chance.

        For a linear map, chance names some block in one report of a thousand; in up to ten, if
        blocks have a few entries alone, whose products are far from normally distributed.
        """
        # The root of the defect is a mean over the probes, and its standard error half as large
        # in comparison: a Student t of num_probes - 1 degrees of freedom.
        limit = student_quantile(self.num_probes - 1, 1 - _CHANCE / (2 * len(self.names)))
        beyond = (2 * self.defect > limit * self.defect_stderr).tolist()
        return tuple(name for name, many in zip(self.names, beyond, strict=True) if many)

    def __repr__(self) -> str:
        width = max(len("block"), *map(len, self.names[:_SHOWN]))
        lines = [
            f"BlockCoupling  {len(self.names)} blocks, {self.num_probes} {self.distribution} "
            f"probes, {self.matvecs:,} products",
            f"  {'block':{width}}  relative error   cosine           relative error² + cosine² - 1",
        ]
        errors = (self.relative_error, self.relative_error_stderr)
        cosines = (self.cosine, self.cosine_stderr)
        table = torch.stack([*errors, *cosines, self.defect, self.defect_stderr], dim=1)
        rows = zip(self.names[:_SHOWN], table.tolist(), strict=False)
        for name, (error, error_stderr, cosine, cosine_stderr, defect, defect_stderr) in rows:
            lines.append(
                f"  {name:{width}}  {error:6.3f} ± {error_stderr:.3f}   "
                f"{cosine:6.3f} ± {cosine_stderr:.3f}   {defect:8.1e} ± {defect_stderr:.1e}"
            )
        if len(self.names) > _SHOWN:
            lines.append(f"  ... and {len(self.names) - _SHOWN} more")
        if self.nonlinear:
            lines.append(
                f"  beyond chance in {len(self.nonlinear)} of {len(self.names)}: "
                "the products are not those of a linear map"
            )
        return "\n".join(lines)


def block_coupling(
    op: CurvatureOperator,
    by: Grouping = "parameter",
    *,
    num_probes: int = 16,
    distribution: Distribution = "gaussian",
    seed: int = 0,
    progress: bool = False,
) -> BlockCoupling:
    """Compare products with those of the diagonal blocks, on random isotropic vectors v.

    The relative error tends to ``‖A[b, not b]‖_F / ‖A[b, :]‖_F`` and the cosine to
    ``‖A[b, b]‖_F / ‖A[b, :]‖_F``, whose squares add up to 1: ``f − k = A[b, not b] v`` and k are
    uncorrelated. This holds for a linear map. Noise in the products, as of finite differences, is
    part of k and of f − k alike and makes the sum exceed 1: for noise as large as the products,
    by an appreciable part of 1; for noise of relative size η ≪ 1, by η⁴ only, where ``op.check()``
    is the finer instrument. As measured, ``defect = (E⟨k, k − f⟩)² / (E‖f‖² E‖k‖²)`` is a square:
    for a linear map it is above zero by about its standard error, and 5/2 of these are as much
    as five standard errors of its root.

    A block whose rows are all zero has relative error 0 and cosine 1; one whose diagonal block
    alone is zero has 1 and 0. Standard errors are jackknifed over the probes; that of the defect
    is at least ten roundoffs.

    Costs ``num_probes (1 + B)`` products for B blocks, in as few passes as memory allows;
    ``progress`` shows a bar that counts them, on a terminal.

    Raises:
        NoParametersError: the operator has no named parameters.
        OptionError: unknown ``by`` or ``distribution``, no such seed, or fewer than two probes.
        NonFiniteError: a product holds NaN or infinity; MemoryEstimateError: memory ran out.

    Source: the metrics of Granziol and Juarev, Hessian spectral analysis at foundation model
    scale, arXiv:2602.00816, section 6, as ratios of means.
    """
    seed = checked_seed(seed)
    refuse_no_operator(op)
    refuse_fractions(num_probes=num_probes)
    if num_probes < 2:
        raise OptionError(
            f"expected num_probes to be at least 2, for standard errors, got {num_probes}; "
            "leave it out for 16"
        )
    names, rows = zip(*((name, B.indices) for name, B in op.blocks(by).items()), strict=True)
    block_diagonal = BlockDiagonalOperator.of(op, by)
    probes = op.space.random(num_probes, seed, distribution)
    total = num_probes * (1 + len(names))
    parts, sizes = [], []
    with run_of_products(op, total=total, progress=progress) as products:
        for V in probes.split(columns_that_fit(op.space), dim=1):
            F, K = products(V), multiply(block_diagonal, V)
            products.count(V.shape[1] * len(names))
            pairs = [_scaled(F[r].double(), K[r].double()) for r in rows]
            parts.append(torch.stack([_moments(f, k) for f, k, _ in pairs], dim=1))
            sizes.append(torch.stack([size for _, _, size in pairs]))
            products.refuse_non_finite(sizes[-1])
    moments = _on_one_scale(torch.cat(parts, dim=2).cpu(), torch.cat(sizes, dim=1).cpu())
    relative_error, relative_error_stderr = _jackknifed(_relative_error, moments)
    cosine, cosine_stderr = _jackknifed(_cosine, moments)
    defect, defect_stderr = _jackknifed(_defect, moments)
    return BlockCoupling(
        names,
        relative_error,
        relative_error_stderr,
        cosine,
        cosine_stderr,
        defect,
        defect_stderr.clamp_min(10 * torch.finfo(op.dtype).eps),
        num_probes,
        products.matvecs,
        distribution,
        seed,
        products.seconds,
    )


def _scaled(F: Tensor, K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns divided by their largest entry, whose square may over- or underflow: (columns,)."""
    size = torch.maximum(F.abs().amax(0), K.abs().amax(0))
    divisor = torch.where(size == 0, 1.0, size)
    return F / divisor, K / divisor, size


def _on_one_scale(moments: Tensor, sizes: Tensor) -> Tensor:
    """Moments (4, num_blocks, num_probes) of scaled columns, in units of the block's largest one.

    Every answer is a ratio for one block: its unit cancels.
    """
    largest = sizes.amax(1, keepdim=True)
    return moments * (sizes / torch.where(largest == 0, 1.0, largest)).square()


def _moments(F: Tensor, K: Tensor) -> Tensor:
    """``‖f − k‖², ‖f‖², ‖k‖², ⟨f, k⟩`` of every column: (4, columns)."""
    return torch.stack([(X * Y).sum(0) for X, Y in ((F - K, F - K), (F, F), (K, K), (F, K))])


def _relative_error(moments: Tensor) -> Tensor:
    error, full, _, _ = moments
    return _ratio(error, full).sqrt()


def _cosine(moments: Tensor) -> Tensor:
    error, full, block, inner = moments
    return torch.where(error + full == 0, 1.0, _ratio(inner, (full * block).sqrt()))


def _defect(moments: Tensor) -> Tensor:
    return _relative_error(moments) ** 2 + _cosine(moments) ** 2 - 1


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    """The quotient, and 0 for 0 / 0."""
    return torch.where(x == 0, 0.0, x / y)


def _jackknifed(statistic: Callable[[Tensor], Tensor], moments: Tensor) -> tuple[Tensor, Tensor]:
    """A statistic of the sums over p probes, and its standard error.

    The jackknife leaves out one probe at a time (Efron and Stein, Annals of Statistics 9, 1981).
    An error that the probes do not determine is infinite.
    """
    p = moments.shape[-1]
    sums = moments.sum(-1)
    others = sums[..., None] - moments
    others[:3].clamp_min_(0)  # rounding may leave squares below zero
    stderr = statistic(others).std(-1, correction=0) * (p - 1) ** 0.5
    return statistic(sums), stderr.nan_to_num(nan=torch.inf, posinf=torch.inf)
