"""2⁻ᵖ A with products of size one, whose squares neither over- nor underflow."""

from __future__ import annotations

import math

from torch import Tensor

from torchlinop.operators.base import CurvatureOperator


class UnitScale(CurvatureOperator):
    """``A / scale`` for the power of two that the first product is about as large as.

    In float32, squares of entries below 1e-19 or above 1e19 are lost. As the scale is a power of
    two, it changes no other digit. Reads the largest entry of a product back, until one is not 0.
    """

    def __init__(self, operator: CurvatureOperator) -> None:
        super().__init__(
            operator.space,
            layout=operator.layout,
            description=[f"a power of two times {operator!r}"],
            positive_semidefinite=operator.positive_semidefinite,
        )
        self.operator = operator
        self.scale: float = 1.0
        self._found = False

    def _matmat(self, V: Tensor) -> Tensor:
        AV = self.operator.matmat(V)
        if not self._found:
            self._find(float(self.space.largest_entry(AV)))
        # Two factors, as 2¹²⁸ is beyond float32.
        root = 2.0 ** (math.log2(self.scale) // 2)
        return AV.div_(root).div_(self.scale / root)

    def _find(self, largest: float) -> None:
        if 0 < largest < math.inf:
            self.scale = 2.0 ** math.frexp(largest)[1]
            self._found = True
