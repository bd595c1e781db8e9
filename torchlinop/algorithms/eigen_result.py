"""Eigenpairs with their residuals, error bounds, and how they came about."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchlinop.algorithms.result import Result, optional
from torchlinop.dtypes import name_of
from torchlinop.errors import NoParametersError
from torchlinop.parameters import ParameterLayout

_SHOWN = 10  # eigenpairs in a repr
_WIDE = 100  # ratio of eigenvalues above which a plot has a logarithmic axis


@dataclass(frozen=True, repr=False, eq=False)
class EigenResult(Result):
    """k eigenpairs, in the order wanted. Unpacks as ``eigenvalues, eigenvectors = result``."""

    eigenvalues: Tensor  # (k,)
    eigenvectors: Tensor  # (n, k), unit columns
    residual_norms: Tensor  # (k,) float64 ‖A x − λ x‖, as residual_kind says
    error_bounds: Tensor  # (k,) float64: an eigenvalue of A is this near, by residual and gap
    converged: Tensor  # (k,) bool: below tol |λ|, and not stopped where others may be beyond
    residual_kind: str  # "true", of a product with x, or "recurrence", exact up to rounding
    status: str  # converged, exact, stagnated, maxmatvecs, maxseconds, interrupted
    method: str
    which: str
    tol: float
    seed: int
    matvecs: int
    matmats: int
    restarts: int
    basis_size: int  # vectors held at once
    basis_dtype: torch.dtype
    dtype: torch.dtype  # of the operator
    orthogonality_loss: float  # max |X^H X − I|
    possible_multiplicity: bool  # some values agree up to their errors: there may be more copies
    peak_bytes: int  # of the basis, the blocks and the eigenvectors
    seconds: float
    history_matvecs: Tensor  # (steps,) int64
    history_eigenvalues: Tensor  # (steps, k) float64, NaN where V was still too small
    history_residuals: Tensor  # (steps, k) float64
    layout: ParameterLayout | None
    warnings: tuple[str, ...]

    _columns: ClassVar[tuple[str, ...]] = (
        "eigenvalues",
        "residual_norms",
        "error_bounds",
        "converged",
    )
    _conventions: ClassVar[str] = "A x = λ x; eigenvectors are unit columns, by residual_kind"

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.eigenvalues, self.eigenvectors))

    def __len__(self) -> int:
        return len(self.eigenvalues)

    def as_parameters(self, i: int) -> dict[str, Tensor]:
        """Eigenvector i, counted from 0, as one tensor a parameter. Views, no copies.

        Raises:
            NoParametersError: the operator has no named parameters.
        """
        if self.layout is None:
            raise NoParametersError(
                "the operator of this result has no named parameters; "
                "use the columns of eigenvectors"
            )
        return self.layout.unflatten(self.eigenvectors[:, i])

    def shares(self, i: int) -> dict[str, float]:
        """The share of every parameter in the squared norm of eigenvector i."""
        pieces = self.as_parameters(i)
        squares = torch.stack([torch.linalg.vector_norm(x).double() ** 2 for x in pieces.values()])
        return dict(zip(pieces, (squares / squares.sum()).tolist(), strict=True))

    def plot(self, ax: Any = None) -> Any:
        """Eigenvalues with their error bounds, in a matplotlib Axes, which is returned.

        Raises:
            OptionError: matplotlib is not installed.
        """
        ax = optional("matplotlib.pyplot").subplots()[1] if ax is None else ax
        values, bounds = self.eigenvalues.double().cpu(), self.error_bounds.cpu()
        ax.errorbar(range(1, len(values) + 1), values.numpy(), yerr=bounds.numpy(), fmt="o")
        smallest, largest = (float(x) for x in values.abs().aminmax())
        if largest > _WIDE * smallest:  # within a decade or two, its axis would have no ticks
            ax.set_yscale("symlog", linthresh=smallest or 1.0)
        ax.set_xticks(range(1, len(values) + 1, max(1, len(values) // 10)))
        ax.set_xlabel("i")
        ax.set_ylabel("eigenvalue")
        return ax

    def __repr__(self) -> str:
        dtype = name_of(self.dtype)
        facts = [
            f"{int(self.converged.sum())} of {len(self)} converged",
            self.which,
            f"{self.method} (ncv={self.basis_size})",
            f"{self.matvecs} matvecs",
            f"{self.seconds:.1f} s",
            dtype,
            f"seed {self.seed}",
        ]
        lines = ["EigenResult  " + " | ".join(facts)]
        share = "   largest share" if self.layout else ""
        lines.append(f"  {'i':>3}  {'eigenvalue':>15}   residual{share}")
        columns = (self.eigenvalues, self.residual_norms, self.converged)
        rows = zip(*(c[:_SHOWN].tolist() for c in columns), strict=True)
        for i, (value, residual, converged) in enumerate(rows):
            digits = _digits(value, residual)
            mark = " " if converged else "*"
            lines.append(f"  {i + 1:3}{mark} {value:15.{digits}e}   {residual:.1e}{self._share(i)}")
        if len(self) > _SHOWN:
            lines.append(f"  ... and {len(self) - _SHOWN} more")
        if not bool(self.converged.all()):
            lines.append("  * not converged")
        lines.append(f"  warnings: {'; '.join(self.warnings) or 'none'}")
        return "\n".join(lines)

    def _share(self, i: int) -> str:
        if self.layout is None:
            return ""
        name, share = max(self.shares(i).items(), key=lambda item: item[1])
        return f"    {name} {100 * share:.0f} %"


def _digits(value: float, residual: float) -> int:
    """As many digits after the point as the residual supports, from 1 to 8."""
    if residual <= 0 or value == 0:
        return 8
    return min(8, max(1, math.floor(math.log10(abs(value) / residual))))
