"""H = ∇² Σ_b w_b L_b(θ) / Σ_b w_b, the Hessian of the mean loss over fixed data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Unpack

from torch import nn

from torchlinop.batches import Batch
from torchlinop.from_model import objective_from_model
from torchlinop.linearization import HessianProducts
from torchlinop.objective import LossFn
from torchlinop.operators.of_objective import ObjectiveOperator, ProductOptions, planned


class HessianOperator(ObjectiveOperator):
    """The Hessian of ``loss_fn(model, batch)``, weighted over all batches by their loss terms.

    The matrix is fixed: trained parameters and buffers are copied, the data are read once (batches
    in a list and frozen parameters are used in place: do not write into them), the model is
    evaluated in ``mode`` and given back bit-identical after every product.

    Args:
        model: its trainable parameters that ``param_filter`` accepts are θ, in the order of
            ``named_parameters``, as one vector of float32, or of the widest parameter dtype.
        dataloader: a DataLoader, a list of batches, any iterable of them, or one bare batch.
        loss_fn: ``(model, batch) -> scalar``, the mean (or sum) over the loss terms of a batch.
        **options: how products are taken (method, fd_eps, linearization, memory_budget,
            column_chunk, compile, cuda_graphs), see ``ProductOptions``; parameters, data, weights
            and mode, see ``ObjectiveOptions``.

    Costs one gradient of the first batch to build, and some fifty forward passes of a few samples
    to weigh several batches. A product costs about two gradients of the data with kept graphs,
    three with rebuilt ones, four with forward over reverse, two with finite differences. Memory:
    kept graphs hold about two sets of activations of all data, rebuilt ones of one batch. With
    ``compile`` or ``cuda_graphs`` the first product of every width takes three, and up to
    half of the memory more.

    Raises:
        OptionError, NoParametersError, ParameterError, DataError, LossShapeError: see there.
        DoubleBackwardError: the model, or the loss, has no second derivative.
        NonFiniteError: at the first product, if it is not finite.
        CaptureError: there, if what ``compile`` or ``cuda_graphs`` asks for cannot be had.

    Source: Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6 (1994).
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[Batch],
        loss_fn: LossFn,
        **options: Unpack[ProductOptions],
    ) -> None:
        plan, rest = planned(options)
        objective = objective_from_model(model, dataloader, loss_fn, **rest)
        super().__init__(objective, HessianProducts(plan.derivative), plan)
