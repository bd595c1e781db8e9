"""What the adapters to SciPy and to CuPy share: dtype and shape, counts, multiples, adjoints."""

from __future__ import annotations

import logging
import numbers
from typing import Any, Self

from tqdm import tqdm

from torchlinop.adapters.dlpack import numpy_dtype
from torchlinop.operators.base import CurvatureOperator
from torchlinop.operators.counting import ProductCount
from torchlinop.operators.rectangular import RectangularOperator
from torchlinop.settings import hidden

log = logging.getLogger("torchlinop")

AnyOperator = CurvatureOperator | RectangularOperator


class Adapter:
    """Mixin before the LinearOperator class of a library. Real operators are scaled inside.

    Scaled here, ``2.0 * A32`` stays float32. SciPy 1.17 and cupyx declare it float64, and then
    eigsh chases digits that the products do not have.
    """

    def __init__(
        self,
        operator: AnyOperator,
        max_matvecs: int | None = None,
        progress: bool = False,
        count: ProductCount | None = None,
    ) -> None:
        super().__init__(numpy_dtype(operator.dtype), operator.shape)  # type: ignore[call-arg]
        if operator.dtype.itemsize < 4:
            exchanged = numpy_dtype(operator.dtype)
            log.info("vectors are exchanged in %s, products are in %s", exchanged, operator.dtype)
        self.args = ()  # documented by SciPy
        self.operator = operator
        self._adjoint_operator: AnyOperator = (
            operator.T if isinstance(operator, RectangularOperator) else operator
        )
        self._count = ProductCount(max_matvecs) if count is None else count
        self._options = (max_matvecs, progress)
        self._bar = tqdm(total=max_matvecs, unit="matvec", disable=hidden(progress))

    @property
    def matvecs(self) -> int:
        """Columns multiplied so far."""
        return self._count.matvecs

    @property
    def matmats(self) -> int:
        """Calls of the operator so far."""
        return self._count.matmats

    def _adjoint(self) -> Self:
        if self._adjoint_operator is self.operator:
            return self
        return type(self)(self._adjoint_operator, *self._options, count=self._count)

    def _transpose(self) -> Any:
        transpose = super()._transpose  # type: ignore[misc]
        return transpose() if self.operator.dtype.is_complex else self._adjoint()

    def _scaled(self, factor: Any) -> Self:
        return type(self)(self.operator * float(factor), *self._options)

    def __mul__(self, x: Any) -> Any:
        product = super().__mul__  # type: ignore[misc]
        return self._scaled(x) if isinstance(x, numbers.Real) else product(x)

    def __rmul__(self, x: Any) -> Any:
        product = super().__rmul__  # type: ignore[misc]
        return self._scaled(x) if isinstance(x, numbers.Real) else product(x)

    def __truediv__(self, x: Any) -> Any:
        return self * (1 / x) if isinstance(x, numbers.Complex) else NotImplemented

    def __neg__(self) -> Any:
        return self._scaled(-1.0)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.operator, *self._options)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.operator!r}>"
