"""An operator that counts its products."""

from __future__ import annotations

from torch import Tensor

from torchlinop.errors import ProductBudgetError
from torchlinop.operators.base import CurvatureOperator


class CountingOperator(CurvatureOperator):
    """The same matrix, counting columns multiplied (``matvecs``) and calls (``matmats``).

    Raises ProductBudgetError before the product that would exceed ``max_matvecs``.
    """

    def __init__(self, operator: CurvatureOperator, max_matvecs: int | None = None) -> None:
        super().__init__(
            operator.space, layout=operator.layout, description=[f"counts {operator!r}"]
        )
        self.operator = operator
        self.max_matvecs = max_matvecs
        self.matvecs = 0
        self.matmats = 0

    def _matmat(self, V: Tensor) -> Tensor:
        if self.max_matvecs is not None and self.matvecs + V.shape[1] > self.max_matvecs:
            raise ProductBudgetError(
                f"{self.matvecs} of {self.max_matvecs} products are used up, and {V.shape[1]} "
                "more were asked for; raise max_matvecs, or ask the solver for less"
            )
        self.matvecs += V.shape[1]
        self.matmats += 1
        return self.operator.matmat(V)
