"""Products counted, and held to a budget."""

from __future__ import annotations

from torch import Tensor

from torchlinop.errors import ProductBudgetError
from torchlinop.operators.base import CurvatureOperator


class ProductCount:
    """Columns multiplied (``matvecs``) and calls (``matmats``), at most ``max_matvecs`` columns."""

    def __init__(self, max_matvecs: int | None = None) -> None:
        self.max_matvecs = max_matvecs
        self.matvecs = 0
        self.matmats = 0

    def add(self, columns: int) -> None:
        """Count a call with so many columns.

        Raises:
            ProductBudgetError: it would exceed the budget; it is not counted.
        """
        if self.max_matvecs is not None and self.matvecs + columns > self.max_matvecs:
            raise ProductBudgetError(
                f"{self.matvecs} of {self.max_matvecs} products are used up, and {columns} "
                "more were asked for; raise max_matvecs, or ask the solver for less"
            )
        self.matvecs += columns
        self.matmats += columns > 0


class CountingOperator(CurvatureOperator):
    """The same matrix, counting columns multiplied (``matvecs``) and calls (``matmats``).

    Raises ProductBudgetError before the product that would exceed ``max_matvecs``.
    """

    def __init__(self, operator: CurvatureOperator, max_matvecs: int | None = None) -> None:
        super().__init__(
            operator.space,
            layout=operator.layout,
            description=[f"counts {operator!r}"],
            positive_semidefinite=operator.positive_semidefinite,
        )
        self.operator = operator
        self.count = ProductCount(max_matvecs)

    @property
    def matvecs(self) -> int:
        return self.count.matvecs

    @property
    def matmats(self) -> int:
        return self.count.matmats

    def _matmat(self, V: Tensor) -> Tensor:
        self.count.add(V.shape[1])
        return self.operator.matmat(V)
