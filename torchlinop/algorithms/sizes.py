"""Numbers of pairs, products, probes and steps are integers of any type; tolerances are numbers."""

from __future__ import annotations

import math
from numbers import Integral, Real

from torchlinop.errors import OptionError


def refuse_fractions(**sizes: object) -> None:
    """Raise OptionError unless these are integers, NumPy's say."""
    for name, size in sizes.items():
        if not isinstance(size, Integral) or isinstance(size, bool):
            raise OptionError(
                f"expected {name} to be an integer, got {size!r}; round it, or leave it out"
            )


def refuse_non_numbers(**numbers: object) -> None:
    """Raise OptionError unless these are real numbers, NumPy's say, and no tensors."""
    for name, number in numbers.items():
        if not isinstance(number, Real) or isinstance(number, bool):
            raise OptionError(
                f"expected {name} to be a number, got {number!r}; pass a float, or leave it out"
            )


def refuse_run(damping: float, max_seconds: float) -> None:
    """Raise OptionError unless the first is a finite number, and the second one above 0."""
    refuse_non_numbers(damping=damping, max_seconds=max_seconds)
    if not -math.inf < damping < math.inf:
        raise OptionError(f"expected a finite damping, got {damping}; pass damping=1e-3, say")
    if not max_seconds > 0:
        raise OptionError(f"expected max_seconds to be positive, got {max_seconds}; leave it out")


def given(**options: object) -> dict[str, object]:
    """Those that are not None."""
    return {name: value for name, value in options.items() if value is not None}
