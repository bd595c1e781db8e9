"""Numbers of pairs, products, probes and steps: integers of any type."""

from __future__ import annotations

from typing import SupportsIndex

from torchlinop.errors import OptionError


def refuse_fractions(**sizes: object) -> None:
    """Raise OptionError unless these are integers, NumPy's say, or None."""
    for name, size in sizes.items():
        if size is not None and not isinstance(size, SupportsIndex):
            raise OptionError(f"expected {name} to be an integer, got {size!r}; round it")
