"""g gᵀ, where g is the gradient of the mean loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Unpack

import torch
from torch import Tensor, nn

from torchlinop.batches import Batch
from torchlinop.choices import refuse_unknown_options
from torchlinop.finiteness import refuse_non_finite
from torchlinop.from_model import ObjectiveOptions, objective_from_model
from torchlinop.objective import LossFn
from torchlinop.operators.base import CurvatureOperator
from torchlinop.parameters import ParameterLayout
from torchlinop.preflight import preflight
from torchlinop.space import VectorSpace


class OuterProductOperator(CurvatureOperator):
    """``g gᵀ`` for a vector g (n,), which is used in place."""

    def __init__(
        self, g: Tensor, layout: ParameterLayout | None = None, description: Sequence[str] = ()
    ) -> None:
        space = VectorSpace(len(g), g.dtype, g.device)
        super().__init__(space, layout=layout, description=description, positive_semidefinite=True)
        self.g = g

    def _matmat(self, V: Tensor) -> Tensor:
        g = self.g[:, None]
        return g @ self.space.inner(g, V).to(V.dtype)


class GradientOuterOperator(OuterProductOperator):
    """``∇L ∇Lᵀ`` with the gradient of the mean loss over all data: of rank one.

    Args: as for ``HessianOperator``.

    Costs two gradients to build; products do not go through the model.
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[Batch],
        loss_fn: LossFn,
        **options: Unpack[ObjectiveOptions],
    ) -> None:
        refuse_unknown_options(options, ObjectiveOptions.__optional_keys__)
        objective = objective_from_model(model, dataloader, loss_fn, **options)
        preflight(objective, second_order=False)
        g = objective.gradient()
        if not torch.isfinite(g).all():
            refuse_non_finite(objective, g)
        super().__init__(g, objective.layout, objective.description)
