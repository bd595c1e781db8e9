"""Matrices whose size can be squared in the dtype of the vectors, and others, which are refused."""

from __future__ import annotations

import torch

from torchlinop.algorithms.products import Products
from torchlinop.errors import OptionError

_MARGIN = 1e4  # the entries of a vector are so much smaller than its norm


def refuse_range(A: Products, scale: float) -> None:
    """Raise OptionError where squares of numbers of size ``scale``, about ‖A‖, vanish or overflow.

    Norms would be zero or infinite then: a Krylov space would seem exhausted, and a matrix
    indefinite.
    """
    limits = torch.finfo(A.dtype)
    low, high = limits.tiny**0.5 * _MARGIN, limits.max**0.5 / _MARGIN
    if scale == 0 or low <= scale <= high:
        return
    raise OptionError(
        f"expected ‖A‖ between {low:.0e} and {high:.0e}, as {A.dtype} can square it, got about "
        f"{scale:.0e} from {A.operator!r}; multiply the operator by a power of two, or use float64"
    )
