"""The largest eigenvalues of a curvature matrix, and what is read from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchlinop.algorithms.result import Result
from torchlinop.dtypes import name_of

_SHOWN = 5  # eigenvalues in a repr


@dataclass(frozen=True, repr=False, eq=False)
class SpectrumResult(Result, Mapping[str, Any]):
    """The k eigenvalues of largest size, and what is read from them.

    It is a dictionary as well: ``result["eigenvalues"]`` is the field, as a list of floats.
    Numbers of positive semidefinite matrices are NaN for indefinite ones, and the other way round.
    """

    eigenvalues: Tensor  # (k,) float64, descending, with regularization_applied
    ritz_residuals: Tensor  # (k,) ‖A x − λ x‖
    error_bounds: Tensor  # (k,) an eigenvalue is this near
    operator: str
    is_psd: bool  # no eigenvalue is negative, by the kind of matrix, and none was found
    iterations: int  # products for these eigenvalues
    operator_calls: int  # products in all
    converged: bool
    n_params: int
    seed: int
    reorth_mode: str  # as in lanczos
    regularization_applied: float
    max_eigenvalue: float
    # Of the k if positive semidefinite; else of the matrix, as is max_eigenvalue: to a residual of
    # 1e-4 ‖A‖, if it is not among the k.
    min_eigenvalue: float
    # Of positive semidefinite matrices. The latter two are of the k eigenvalues: not of the matrix.
    spectral_gap: float  # λ₁ − λ₂
    ritz_condition_number: float  # λ₁ / λ_k, infinite if that is zero to rounding
    ritz_effective_rank: float  # (Σ λ)² / Σ λ²
    # Of indefinite matrices.
    has_negative_eigenvalues: bool  # beyond rounding
    n_negative: int  # of the k, beyond their error bounds
    range_ratio: float  # |λ_max| / |λ_min|
    sharpness_score: float  # max |λ|
    most_negative_eigenvalue: float  # of the matrix; 0 if there is none
    # Of all n eigenvalues, not of the k: by quadrature, or exactly where that costs no more.
    negative_fraction: float
    negative_fraction_low: float  # with probability 0.95 above this
    negative_fraction_high: float  # and below this
    negative_mass: float  # Σ_{λ < 0} |λ| / Σ |λ|
    negative_mass_stderr: float  # of the probes
    dtype: torch.dtype
    seconds: float
    warnings: tuple[str, ...]

    _columns: ClassVar[tuple[str, ...]] = ("eigenvalues", "ritz_residuals", "error_bounds")

    def __getitem__(self, name: str) -> Any:
        if name not in self._values():
            raise KeyError(name)
        return _plain(getattr(self, name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._values())

    def __len__(self) -> int:
        return len(self._values())

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, as numbers, strings and lists: ready for JSON."""
        return dict(self)

    def __repr__(self) -> str:
        kind = "positive semidefinite" if self.is_psd else "indefinite"
        state = "converged" if self.converged else "not converged"
        listed = [f"{value:.6g}" for value in self.eigenvalues[:_SHOWN].tolist()]
        listed += ["..."] if len(self.eigenvalues) > _SHOWN else []
        read = self._read_of_psd() if self.is_psd else self._read_of_indefinite()
        lines = [
            f"SpectrumResult  {self.operator} | {kind} | n = {self.n_params:,} | {state} | "
            f"{self.operator_calls} products | {self.seconds:.1f} s | seed {self.seed}",
            f"  {len(self.eigenvalues)} eigenvalues  {', '.join(listed)}",
            f"  residuals at most {float(self.ritz_residuals.max()):.1e}",
            *read,
            f"  warnings: {'; '.join(self.warnings) or 'none'}",
        ]
        return "\n".join(lines)

    def _read_of_psd(self) -> list[str]:
        return [
            f"  gap {self.spectral_gap:.4g} | of these eigenvalues: condition number "
            f"{self.ritz_condition_number:.4g}, effective rank {self.ritz_effective_rank:.4g}",
            f"  regularization {self.regularization_applied:.4g}",
        ]

    def _read_of_indefinite(self) -> list[str]:
        return [
            f"  from {self.min_eigenvalue:.6g} to {self.max_eigenvalue:.6g} | sharpness "
            f"{self.sharpness_score:.4g} | range ratio {self.range_ratio:.4g}",
            f"  negative: {self.negative_fraction:.2%} of all eigenvalues, 95 % "
            f"[{self.negative_fraction_low:.2%}, {self.negative_fraction_high:.2%}]; "
            f"{self.negative_mass:.2%} +- {self.negative_mass_stderr:.1%} of their sizes",
        ]


def _plain(value: Any) -> Any:
    """Tensors and tuples as lists, and a dtype as its name."""
    if isinstance(value, torch.dtype):
        return name_of(value)
    if isinstance(value, Tensor):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value
