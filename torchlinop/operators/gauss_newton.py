"""G = Σ_b share_b Jᵀ M J, where J is the Jacobian of the model's outputs and M acts on outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Unpack, get_args

from torch import Tensor, nn

from torchlinop.batches import Batch
from torchlinop.choices import refuse_unknown
from torchlinop.derivatives import Derivative, Function, LinearMap
from torchlinop.from_model import output_objective
from torchlinop.losses.autograd import AutogradLoss
from torchlinop.losses.base import LossOfOutput, OutputMap
from torchlinop.losses.cross_entropy import CrossEntropy
from torchlinop.losses.elementwise import ElementwiseLoss
from torchlinop.losses.of_model import ForwardFn
from torchlinop.losses.recognition import loss_of_output
from torchlinop.operators.of_objective import ObjectiveOperator, ProductOptions, planned

LossHvp = Literal["analytical", "autograd"]

_CONVEX = (CrossEntropy, ElementwiseLoss)  # in the outputs

# (outputs, batch, number of its first sample among all) -> u ↦ M u
Metric = Callable[[Tensor, Batch, int], OutputMap]


@dataclass(frozen=True)
class GaussNewtonProducts:
    """Linearises ``of(model, batch)`` and multiplies by ``Jᵀ M J``."""

    derivative: Derivative
    of: ForwardFn
    metric: Metric

    def __call__(self, f: Function, theta: Tensor, start: int, batch: Batch) -> LinearMap:
        local = self.derivative.linearize(f, theta)
        M = self.metric(local.outputs, batch, start)
        shape, push, pull = local.outputs.shape, local.push, local.pull

        def product(V: Tensor, *, last: bool = False) -> Tensor:
            k = V.shape[1]
            U = _own(push(V, last=last).mT, V).reshape(k, *shape)
            return pull(M(U).reshape(k, -1).mT, last=last).to(V.dtype)

        return product


def _own(U: Tensor, V: Tensor) -> Tensor:
    """U in dense memory that is not V's: M may overwrite it."""
    U = U.contiguous()
    shared = U.untyped_storage().data_ptr() == V.untyped_storage().data_ptr()
    return U.clone() if shared else U


@dataclass(frozen=True)
class LossHessian:
    """``M = ∇²L``, the Hessian of the loss with respect to the outputs."""

    loss: LossOfOutput

    def __call__(self, outputs: Tensor, batch: Batch, start: int) -> OutputMap:
        return self.loss.hessian(outputs, batch)


class GGNOperator(ObjectiveOperator):
    """The generalised Gauss-Newton matrix ``Σ_b share_b J_bᵀ (∇²L_b) J_b``, exact by default.

    J_b is the Jacobian of ``forward_fn(model, batch)`` and ∇²L_b the Hessian of the loss with
    respect to these outputs. Positive semidefinite if the loss is convex in the outputs; equal to
    the Hessian if the outputs are linear in θ; equal to the Fisher information for losses that
    are the negative log-likelihood of an exponential family in its natural parameters, such as
    cross-entropy and the mean squared error.

    Args:
        model, dataloader: as for ``HessianOperator``.
        forward_fn: ``(model, batch) -> outputs``, one tensor (an output object's logits).
        loss_of_output_fn: a loss module or functional of torch, applied to the targets in the
            batch; one of ``torchlinop.losses``; or any ``(outputs, batch) -> scalar``.
        loss_hvp: ``"analytical"`` uses the loss's closed form, or its own ``.hvp(outputs, batch,
            u)``, where there is one, and autograd elsewhere; ``"autograd"`` differentiates always.
        **options: see ``ProductOptions``.

    Costs two gradients of the first batch to build. A product costs about 4/3 gradients with kept
    graphs and 7/3 with rebuilt ones. Memory: as for a Hessian, and the softmax of the outputs.

    Raises:
        LossShapeError: the outputs are no tensor.
        BatchError: the targets cannot be found in the batch.
        TorchlinopError: as ``HessianOperator``.

    Source: Schraudolph, Fast curvature matrix-vector products for second-order gradient descent,
    Neural Computation 14 (2002).
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[Batch],
        forward_fn: ForwardFn,
        loss_of_output_fn: Any,
        *,
        loss_hvp: LossHvp = "analytical",
        **options: Unpack[ProductOptions],
    ) -> None:
        given = loss_of_output(loss_of_output_fn)
        loss = _with_products(given, loss_hvp)
        plan, rest = planned(options)
        objective = output_objective(model, dataloader, forward_fn, loss, **rest)
        work = GaussNewtonProducts(plan.derivative, objective.function.outputs, LossHessian(loss))
        convex = isinstance(given, _CONVEX)
        super().__init__(objective, work, plan, positive_semidefinite=convex)


def _with_products(loss: LossOfOutput, loss_hvp: LossHvp) -> LossOfOutput:
    refuse_unknown("loss_hvp", loss_hvp, get_args(LossHvp))
    return AutogradLoss(loss, loss.weighting) if loss_hvp == "autograd" else loss
