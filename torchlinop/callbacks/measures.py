"""What can be asked of a matrix again and again while it changes slowly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from torchlinop.algorithms.eigen_result import EigenResult
from torchlinop.algorithms.krylov_schur import Which
from torchlinop.algorithms.lanczos import lanczos
from torchlinop.algorithms.result import Result
from torchlinop.algorithms.spectral_density import SpectralDensity, spectral_density
from torchlinop.algorithms.trace import trace
from torchlinop.algorithms.trace_method import Method
from torchlinop.algorithms.trace_result import TraceResult
from torchlinop.operators.base import CurvatureOperator

Answer = TypeVar("Answer", bound=Result)

# Where a block of the eigenvectors of before beats their sum as a start; see ``lanczos``.
_COARSE, _FEW = 1e-2, 5


class Measure(Protocol[Answer]):
    """A question to an operator, and which numbers of the answer are followed."""

    def __call__(self, op: CurvatureOperator, last: Answer | None) -> Answer:
        """The answer; ``last`` is the one of the operator before, if there is one."""
        ...

    def scalars(self, found: Answer) -> dict[str, float]:
        """Numbers by name, for a logger."""
        ...


@dataclass(frozen=True)
class TopEigenvalues:
    """The k eigenvalues at an end of the spectrum, each run started from the last eigenvectors.

    Arguments are those of ``lanczos``. Eigenvalues are about as accurate as tol². Keeps k vectors
    from one measurement to the next.
    """

    k: int = 3
    which: Which = "LA"
    tol: float = 1e-2
    max_iter: int | None = None
    seed: int = 0

    def __call__(self, op: CurvatureOperator, last: EigenResult | None) -> EigenResult:
        return lanczos(
            op, self.k, self.max_iter, which=self.which, tol=self.tol, seed=self.seed,
            v0=self._start(op, last),
        )  # fmt: skip

    def scalars(self, found: EigenResult) -> dict[str, float]:
        """The eigenvalues, counted from 1, and how many of them have converged."""
        values = enumerate(found.eigenvalues.tolist(), 1)
        return {f"eigenvalue_{i}": value for i, value in values} | {
            "converged": float(found.converged.sum())
        }

    def _start(self, op: CurvatureOperator, last: EigenResult | None) -> Tensor | None:
        if last is None or last.eigenvectors.shape[0] != op.size:  # layers were frozen, say
            return None
        X = last.eigenvectors.to(op.device)
        return X if self.tol >= _COARSE and self.k <= _FEW else X.sum(1)


@dataclass(frozen=True)
class Trace:
    """An estimate of the trace, by the same probes every time, so that changes stand out.

    Arguments are those of ``trace``.
    """

    num_matvecs: int | None = None
    method: Method = "auto"
    seed: int = 0

    def __call__(self, op: CurvatureOperator, last: TraceResult | None) -> TraceResult:
        return trace(op, self.num_matvecs, method=self.method, seed=self.seed)

    def scalars(self, found: TraceResult) -> dict[str, float]:
        """The estimate and its standard error."""
        return {"trace": found.estimate, "trace_stderr": found.stderr}


@dataclass(frozen=True)
class Density:
    """The density of all eigenvalues, by the same probes every time.

    Arguments are those of ``spectral_density``.
    """

    num_runs: int = 2
    lanczos_steps: int = 40
    seed: int = 0

    def __call__(self, op: CurvatureOperator, last: SpectralDensity | None) -> SpectralDensity:
        return spectral_density(op, self.num_runs, self.lanczos_steps, seed=self.seed)

    def scalars(self, found: SpectralDensity) -> dict[str, float]:
        """The ends of the spectrum, the share below zero, and how many outliers there are."""
        return {f"density_{name}": value for name, value in found.scalars().items()}
