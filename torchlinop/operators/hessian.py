"""H = ∇² Σ_b w_b L_b(θ) / Σ_b w_b, the Hessian of the mean loss over fixed data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, Unpack

import torch
from torch import Tensor, nn

from torchlinop.batches import Batch
from torchlinop.derivatives import (
    Derivative,
    FiniteDifference,
    ForwardOverReverse,
    ReverseOverReverse,
)
from torchlinop.errors import OptionError
from torchlinop.finiteness import refuse_non_finite
from torchlinop.from_model import ObjectiveOptions, objective_from_model
from torchlinop.linearization import LinearizationPlan, Policy
from torchlinop.objective import LossFn, Objective
from torchlinop.operators.base import CurvatureOperator
from torchlinop.preflight import preflight

Method = Literal["autograd", "forward_over_reverse", "finite_difference"]


class HessianOperator(CurvatureOperator):
    """The Hessian of ``loss_fn(model, batch)``, weighted over all batches by their loss terms.

    The matrix is fixed: trained parameters and buffers are copied, the data are read once (batches
    in a list and frozen parameters are used in place: do not write into them), the model is
    evaluated in ``mode`` and given back bit-identical after every product.

    Args:
        model: its trainable parameters that ``param_filter`` accepts are θ, in the order of
            ``named_parameters``, as one vector of float32, or of the widest parameter dtype.
        dataloader: a DataLoader, a list of batches, any iterable of them, or one bare batch.
        loss_fn: ``(model, batch) -> scalar``, the mean (or sum) over the loss terms of a batch.
        method: ``"autograd"`` (reverse over reverse, exact), ``"forward_over_reverse"`` (exact),
            ``"finite_difference"`` (central differences of gradients), or a Derivative.
        fd_eps: Euclidean length of the finite difference's step, by default u^(1/3) (1 + ‖θ‖).
        linearization: ``"keep"`` the graphs at θ between products, ``"rebuild"`` them for each,
            or ``"auto"``: keep them if they take at most ``memory_budget`` bytes.
        memory_budget: by default half of the free memory of the device.
        column_chunk: columns of a block that go through one pass; measured by default.
        **options: see ``ObjectiveOptions``.

    Costs one gradient of the first batch to build, and some fifty forward passes of a few samples
    to weigh several batches. A product costs about two gradients of the data with kept graphs,
    three with rebuilt ones, four with forward over reverse, two with finite differences. Memory:
    kept graphs hold about two sets of activations of all data, rebuilt ones of one batch.

    Raises:
        OptionError, NoParametersError, ParameterError, DataError, LossShapeError,
        DoubleBackwardError: see there; NonFiniteError at the first product.

    Source: Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6 (1994).
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[Batch],
        loss_fn: LossFn,
        *,
        method: Method | Derivative = "autograd",
        fd_eps: float | None = None,
        linearization: Policy = "auto",
        memory_budget: int | None = None,
        column_chunk: int | None = None,
        **options: Unpack[ObjectiveOptions],
    ) -> None:
        derivative = _derivative(method, fd_eps)
        plan = LinearizationPlan(derivative, linearization, memory_budget, column_chunk)
        objective = objective_from_model(model, dataloader, loss_fn, **options)
        _refuse_coarse_differences(derivative, objective)
        facts = preflight(objective, second_order=derivative.exact)
        self.objective = objective
        self._terms = plan.carry_out(objective, facts)
        self._proven_finite = False
        super().__init__(
            objective.space,
            layout=objective.layout,
            description=[*objective.description, f"{method}, {self._terms.name}"],
            notes=facts.notes(objective),
        )

    def _matmat(self, V: Tensor) -> Tensor:
        HV = self.objective.mean(lambda b, batch: self._terms(b, batch, V))
        # Once, as it makes the host wait for the device; a NaN in V is the caller's own.
        if not self._proven_finite and torch.isfinite(V).all():
            if not torch.isfinite(HV).all():
                refuse_non_finite(self.objective, HV)
            self._proven_finite = True
        return HV

    @property
    def linearization(self) -> str:
        """What was decided about the graphs at θ: "kept" or "rebuilt"."""
        return self._terms.name

    def loss(self) -> Tensor:
        """The mean loss: a scalar."""
        return self.objective.loss()

    def gradient(self) -> Tensor:
        """The gradient of the mean loss: (n,)."""
        return self.objective.gradient()


_METHODS: dict[str, Callable[[float | None], Derivative]] = {
    "autograd": lambda step: ReverseOverReverse(),
    "forward_over_reverse": lambda step: ForwardOverReverse(),
    "finite_difference": FiniteDifference,
}


def _derivative(method: Method | Derivative, fd_eps: float | None) -> Derivative:
    if fd_eps is not None and not (method == "finite_difference" and fd_eps > 0):
        raise OptionError(
            f"fd_eps is the positive step length of method='finite_difference', "
            f"got fd_eps={fd_eps} with method={method!r}; leave it out"
        )
    if isinstance(method, type):
        raise OptionError(f"expected a Derivative, got a class; pass {method.__name__}()")
    if not isinstance(method, str):
        return method
    if method not in _METHODS:
        raise OptionError(f"unknown method {method!r}; choose one of {', '.join(_METHODS)}")
    return _METHODS[method](fd_eps)


def _refuse_coarse_differences(derivative: Derivative, objective: Objective) -> None:
    coarsest = objective.layout.precision
    if coarsest != objective.space.dtype and not derivative.exact:
        raise OptionError(
            f"finite differences need all parameters in {objective.space.dtype}, the dtype of the "
            f"vectors, got some in {coarsest}, which rounds the step away; "
            'use method="autograd", or model.float() before the operator is built'
        )
