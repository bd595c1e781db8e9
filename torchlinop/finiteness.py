"""NaN and infinity, refused by the name of the batch that they come from."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinop.batches import Batch
from torchlinop.derivatives import gradient_of
from torchlinop.errors import NonFiniteError
from torchlinop.objective import Objective


def refuse_non_finite(objective: Objective, product: Tensor) -> None:
    """Raise NonFiniteError naming the batch and parameter that made ``product`` (n, k) so."""
    bad = int((~torch.isfinite(product)).sum())

    def locate(b: int, batch: Batch) -> Tensor:
        with objective.evaluating(b, batch) as f:
            loss, g = f(objective.theta), gradient_of(f, objective.theta)
        for name, piece in objective.layout.unflatten(g).items():
            if not (torch.isfinite(loss) and torch.isfinite(piece).all()):
                raise NonFiniteError(
                    f"the product has {bad} NaN or infinite entries: in batch {b} the loss is "
                    f"{float(loss):.4g} and the gradient of {name} is not finite. "
                    "Clean this batch, or the parameters"
                )
        return g

    objective.mean(locate, objective.theta)
    raise NonFiniteError(
        f"the product has {bad} NaN or infinite entries, though loss and gradient are finite: "
        "a derivative is singular, as that of sqrt or norm at 0, or the product overflows. "
        "Smooth the loss there, or scale v down"
    )


def refuse_non_finite_outputs(outputs: Tensor, b: int) -> None:
    """Raise NonFiniteError for outputs of the model on batch ``b`` that are so."""
    if not torch.isfinite(outputs).all():
        raise NonFiniteError(
            f"the model's outputs on batch {b} hold NaN or infinity; clean the data, or the "
            "parameters"
        )
