"""A curvature matrix by its name, with the loss that fits the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from torchlinop.batches import Batch
from torchlinop.choices import refuse_unknown
from torchlinop.errors import OptionError
from torchlinop.losses.base import LossOfOutput
from torchlinop.losses.cross_entropy import CrossEntropy
from torchlinop.losses.huggingface import (
    hf_lm_forward,
    hf_lm_loss_of_output,
    hf_seq2seq_loss_of_output,
)
from torchlinop.losses.of_model import ForwardFn, LossOfModel
from torchlinop.losses.real_targets import MeanSquaredError
from torchlinop.losses.recognition import loss_of_output
from torchlinop.losses.supervised import supervised_forward
from torchlinop.losses.targets import named_parts, targets_of
from torchlinop.model_state import unwrap
from torchlinop.objective import LossFn
from torchlinop.operators.base import CurvatureOperator
from torchlinop.operators.empirical_fisher import EmpiricalFisherOperator
from torchlinop.operators.gauss_newton import GGNOperator
from torchlinop.operators.hessian import HessianOperator
from torchlinop.operators.kfac import KFACOperator
from torchlinop.operators.kronecker import KroneckerOperator
from torchlinop.signatures import takes

OperatorType = Literal["hessian", "ggn", "empirical_fisher", "kfac"]
GGNMode = Literal["true", "empirical", "auto"]
LossWithoutArguments = Callable[[], Tensor]  # of a model and a batch that it knows by itself


def create_operator(  # noqa: PLR0917  # in the order that callers know
    operator_type: OperatorType,
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFn | LossWithoutArguments | None = None,
    kfac_factors: KroneckerOperator | None = None,
    device: torch.device | str | None = None,
    ggn_mode: GGNMode = "true",
    *,
    forward_fn: ForwardFn | None = None,
    loss_of_output_fn: Any = None,
    **options: Any,
) -> CurvatureOperator:
    """A curvature matrix of the model on one batch, by name.

    Where no loss is given it is chosen by the batch: with ``input_ids`` and labels for tokens (or
    none), the cross-entropy of a language model, of next tokens unless it is an encoder-decoder or
    labels tokens themselves; else cross-entropy for integer targets, and the mean squared error
    for others.

    Args:
        operator_type: ``"hessian"``, ``"ggn"``, ``"empirical_fisher"`` or ``"kfac"``.
        model: as for the operators.
        batch: one, not a list of them.
        loss_fn: ``(model, batch) -> scalar``, for the Hessian and the empirical Fisher matrix. For
            the Hessian also ``() -> scalar``, which evaluates this very model, on data of its own.
        kfac_factors: a ``KroneckerOperator`` computed or loaded before, taken as it is.
        device: where the model is, if given. The batch is moved there.
        ggn_mode: ``"empirical"`` makes the GGN the empirical Fisher matrix, which is another
            matrix; ``"auto"`` is ``"true"``.
        forward_fn: ``(model, batch) -> outputs``, for all four.
        loss_of_output_fn: as for ``GGNOperator``, for all four.
        **options: of the operator.

    Raises:
        OptionError: an unknown name, or a loss that does not fit the operator; and as the operator.
    """
    refuse_unknown("operator_type", operator_type, get_args(OperatorType))
    refuse_unknown("ggn_mode", ggn_mode, get_args(GGNMode))
    _refuse_other_device(model, device)
    if kfac_factors is not None:
        return _given(operator_type, kfac_factors)
    if operator_type == "ggn" and ggn_mode == "empirical":
        operator_type = "empirical_fisher"
    if loss_fn is not None:
        _refuse_other_losses(operator_type, forward_fn, loss_of_output_fn)
        of_model = _of_model_and_batch(loss_fn, operator_type, model, batch, options)
        return _OF_MODEL[operator_type](model, [batch], of_model, **options)
    forward, loss = pieces_for(model, batch, forward_fn, loss_of_output_fn)
    return _OF_OUTPUTS[operator_type](model, [batch], forward, loss, **options)


def _given(operator_type: str, factors: object) -> KroneckerOperator:
    if operator_type != "kfac" or not isinstance(factors, KroneckerOperator):
        raise OptionError(
            'expected kfac_factors to be a KroneckerOperator, with operator_type="kfac", got a '
            f"{type(factors).__name__} with {operator_type!r}; pass KFACOperator(...), or "
            "KroneckerOperator.load(path)"
        )
    return factors


def _hessian_of_outputs(
    model: nn.Module, data: list[Batch], forward: ForwardFn, loss: LossOfOutput, **options: Any
) -> HessianOperator:
    return HessianOperator(model, data, LossOfModel(forward, loss), **options)


_OF_MODEL: Mapping[str, Callable[..., CurvatureOperator]] = {
    "hessian": HessianOperator,
    "empirical_fisher": EmpiricalFisherOperator,
}
_OF_OUTPUTS: Mapping[str, Callable[..., CurvatureOperator]] = {
    "hessian": _hessian_of_outputs,
    "ggn": GGNOperator,
    "empirical_fisher": EmpiricalFisherOperator,
    "kfac": KFACOperator,
}

# Heads of Hugging Face whose labels are for the token at their position.
_ALIGNED = ("ForMaskedLM", "ForTokenClassification")


def pieces_for(
    model: nn.Module, batch: Batch, forward_fn: ForwardFn | None, loss: Any
) -> tuple[ForwardFn, LossOfOutput]:
    """The forward function and the loss of outputs: those given, or those that fit the batch."""
    of_tokens = _is_of_tokens(batch)
    forward = forward_fn or (hf_lm_forward() if of_tokens else supervised_forward)
    if loss is not None:
        return forward, loss_of_output(loss)
    if of_tokens:
        module = unwrap(model)
        aligned = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
        aligned = aligned or type(module).__name__.endswith(_ALIGNED)
        return forward, hf_seq2seq_loss_of_output() if aligned else hf_lm_loss_of_output()
    real = targets_of(batch).is_floating_point()
    return forward, MeanSquaredError() if real else CrossEntropy()


def _is_of_tokens(batch: Batch) -> bool:
    named = named_parts(batch)
    if named is None or "input_ids" not in named:
        return False
    labels = named.get("labels")
    return labels is None or labels.ndim > 1


def _refuse_other_losses(operator_type: str, forward_fn: object, loss_of_output_fn: object) -> None:
    if operator_type not in _OF_MODEL:
        raise OptionError(
            f"expected the loss of {operator_type!r} as a function of outputs, got loss_fn; pass "
            "forward_fn and loss_of_output_fn in its place"
        )
    if forward_fn is not None or loss_of_output_fn is not None:
        raise OptionError(
            "expected loss_fn, or forward_fn and loss_of_output_fn, got some of both; "
            "leave out loss_fn"
        )


def _refuse_other_device(model: nn.Module, device: torch.device | str | None) -> None:
    where = next((p.device for p in model.parameters()), None)
    if device is None or where is None:
        return
    asked = torch.device(device)
    if asked.type != where.type or asked.index not in (None, where.index):
        raise OptionError(
            f"expected device to be that of the model, {where}, got {device}; move the model "
            "there, or leave out device"
        )


def takes_nothing(loss_fn: Callable[..., Any]) -> bool:
    """Whether the function can be called without arguments, and not with two."""
    return takes(loss_fn, 0, unknown=False) and not takes(loss_fn, 2)


def _of_model_and_batch(
    loss_fn: Callable[..., Tensor],
    operator_type: str,
    model: nn.Module,
    batch: Batch,
    options: Mapping[str, Any],
) -> LossFn:
    """The loss as a function ``(model, batch)``, also if it takes nothing."""
    if takes(loss_fn, 2):
        return loss_fn
    if not takes_nothing(loss_fn):
        raise OptionError(
            f"expected loss_fn(model, batch), got {loss_fn!r}, which takes other arguments; "
            "pass lambda model, batch: model(**batch).loss, say"
        )
    if operator_type != "hessian" or "microbatch_size" in options:
        raise OptionError(
            "expected loss_fn(model, batch), which is evaluated on parts of the batch, got a "
            "function without arguments; pass lambda model, batch: model(**batch).loss, say"
        )
    # Parameters are put into the model itself while it is evaluated, so that a function which
    # knows the model by itself sees them.
    return lambda model, batch: loss_fn()
