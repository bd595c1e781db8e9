"""tr A = E[ωᵀ A ω]: the mean over independent probes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchlinop.algorithms.probes import Probes, forms, on_host
from torchlinop.algorithms.products import Products, roundoff
from torchlinop.algorithms.student import student_quantile
from torchlinop.errors import OptionError
from torchlinop.space import Distribution

_ROUNDINGS = 4  # in an estimate, which sums many of them: observed up to 4 beyond the rank


def unseen(dtype: torch.dtype) -> float:
    """What rounding does to all products alike, relative to ``Σ |terms|``: no probe can see it."""
    return max(torch.finfo(dtype).eps, _ROUNDINGS * roundoff(dtype))


@dataclass(frozen=True)
class Estimate:
    """The mean of ``samples``, and the standard error that its method justifies."""

    samples: Tensor  # (k,) float64, on the CPU
    stderr: float
    # Σ |terms| where the estimate is a sum whose terms may cancel: what rounding is relative to.
    magnitude: float = 0.0

    @property
    def value(self) -> float:
        return float(self.samples.mean())

    def interval(self, level: float) -> tuple[float, float]:
        """Where the truth is with this probability, by Student's t."""
        return student_interval(self.value, self.stderr, len(self.samples), level)


def student_interval(
    estimate: float, stderr: float, samples: int, level: float
) -> tuple[float, float]:
    """``estimate ± t stderr`` with one degree of freedom less than there are samples.

    Raises:
        OptionError: the level is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise OptionError(f"expected level between 0 and 1, got {level}; 0.95 is usual")
    certain = stderr == 0 or math.isinf(stderr)
    wide = stderr if certain else student_quantile(samples - 1, (1 + level) / 2) * stderr
    return estimate - wide, estimate + wide


def of_independent(samples: Tensor, offset: float = 0.0) -> Estimate:
    """The mean of independent samples, added to ``offset``; one alone has no standard error."""
    k = len(samples)
    stderr = float(samples.std() / k**0.5) if k > 1 else float("inf")
    return Estimate(offset + samples, stderr)


class Hutchinson:
    """Hutchinson's estimator (Communications in Statistics 18, 1989).

    Variance of a sample: Rademacher ``2 (‖A‖_F² - Σ a_ii²)``, Gaussian ``2 ‖A‖_F²``, sphere
    ``2n/(n+2) (‖A‖_F² - tr(A)²/n)``. Keeps no vectors.
    """

    fewest: ClassVar[int] = 1
    vectors: ClassVar[float] = 0.0
    usual: ClassVar[Distribution] = "rademacher"

    def __init__(self, products: Products, distribution: Distribution, seed: int) -> None:
        self._products = products
        self._probes = Probes(products.operator.space, distribution, seed, 0)
        self._samples: list[Tensor] = []

    @property
    def matvecs(self) -> int:
        return sum(map(len, self._samples))

    def spend(self, num_matvecs: int) -> Iterator[None]:
        """Go on until ``num_matvecs`` products are spent in all."""
        for X in self._probes.chunks(self.matvecs, num_matvecs):
            yield
            self._samples.append(forms(self._products, X))

    def estimate(self) -> Estimate:
        (samples,) = on_host(self._products, torch.cat(self._samples))
        return of_independent(samples)
