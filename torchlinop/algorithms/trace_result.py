"""What a trace estimator found: a number with its standard error, and how it was found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchlinop.algorithms.hutchinson import student_interval
from torchlinop.algorithms.result import Result, optional


@dataclass(frozen=True, repr=False, eq=False)
class TraceResult(Result):
    """An estimate of tr A, the mean of ``samples``.

    The standard error is that of the method: of independent samples for ``"hutchinson"``, of the
    residual samples for ``"hutch++"`` and ``"na-hutch++"``, the jackknife for ``"xtrace"`` and
    ``"xnystrace"``. It is 0 for ``"exact"``, and infinite where one sample was all.

    Each of the ``samples`` is an unbiased estimate of tr A by itself: ωᵀAω for ``"hutchinson"``;
    what the sketch has captured plus one residual sample for ``"hutch++"`` and ``"na-hutch++"``;
    the estimate in which probe i samples what all others have left for ``"xtrace"`` and
    ``"xnystrace"``, whose samples are therefore not independent; the trace for ``"exact"``.
    A run that ended early is an estimate from the products taken, and says so in ``warnings``.
    """

    estimate: float
    stderr: float
    samples: Tensor  # (k,) float64, on the CPU
    method: str
    distribution: str
    matvecs: int
    operator_size: int
    converged: bool  # all products granted were spent; with rtol, it was reached
    rtol: float | None
    seed: int
    dtype: torch.dtype
    seconds: float
    warnings: tuple[str, ...] = ()

    _columns: ClassVar[tuple[str, ...]] = ("samples",)

    @property
    def num_matvecs(self) -> int:
        """Products spent, the same as ``matvecs``."""
        return self.matvecs

    def confidence_interval(self, level: float = 0.95) -> tuple[float, float]:
        """Where tr A is with this probability, by Student's t: one degree of freedom a sample.

        Raises:
            OptionError: the level is not between 0 and 1.
        """
        return student_interval(self.estimate, self.stderr, len(self.samples), level)

    def plot(self, ax: Any = None) -> Any:
        """The running mean of the samples in a matplotlib Axes, which is returned.

        The band is two standard errors, that of the result times √(k / j) after j of k samples.

        Raises:
            OptionError: matplotlib is not installed.
        """
        ax = optional("matplotlib.pyplot").subplots()[1] if ax is None else ax
        k = len(self.samples)
        j = torch.arange(1, k + 1, dtype=torch.float64)
        means = self.samples.cumsum(0) / j
        (line,) = ax.plot(j, means, marker="." if k == 1 else None)
        if math.isfinite(self.stderr):
            band = 2 * self.stderr * (k / j).sqrt()
            ax.fill_between(j, means - band, means + band, color=line.get_color(), alpha=0.3)
        ax.set(xlabel="samples", ylabel="trace", title=self.method)
        return ax

    def __repr__(self) -> str:
        facts = [*self._number(), f"{self.matvecs:,} matvecs", f"seed {self.seed}"]
        if 0 < self.stderr < math.inf:
            digits = _digits(self.estimate, self.stderr)
            low, high = self.confidence_interval()
            facts.append(f"95 % [{low:{digits}}, {high:{digits}}]")
        notes = [f"  {warning}" for warning in self.warnings]
        return "\n".join(["TraceResult  " + " | ".join(facts), *notes])

    def _number(self) -> tuple[str, str]:
        if self.stderr == 0:
            return f"{self.estimate:.10g}", self.method
        digits = _digits(self.estimate, self.stderr)
        return f"{self.estimate:{digits}} +- {self.stderr:.2g} (1 s.e.)", self.method


def _digits(estimate: float, stderr: float) -> str:
    """The format that shows two digits of the standard error, and no more of the estimate."""
    if not 0 < abs(estimate) < math.inf or stderr == math.inf:
        return ".2g"
    digits = 2 + math.floor(math.log10(abs(estimate))) - math.floor(math.log10(stderr))
    return f"#.{min(16, max(2, digits))}g"
