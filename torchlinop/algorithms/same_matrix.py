"""Whether a run that goes on is one of the matrix with which it began."""

from __future__ import annotations

from torchlinop.algorithms.products import Products
from torchlinop.errors import OptionError

_TIMES_NOISE = 10  # what several noisy products differ by


def refuse_another_matrix(products: Products, difference: float, rounding: float) -> None:
    """Raise OptionError for a ``difference`` of products that is not the same matrix's.

    It is relative to ‖A‖. More than ``rounding`` may be noise, as of finite differences: that is
    measured by ``operator.check()``, whose six products are not counted.
    """
    if difference <= rounding:
        return
    if difference <= _TIMES_NOISE * products.operator.check().noise:
        return
    raise OptionError(
        f"the matrix is not that of the checkpoint: a product differs by {difference:.0e} "
        "of its norm; pass the path of another file, or delete this one"
    )
