"""What build() returns, as the operator that the options ask for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from torchlinop.adapters.scipy import from_linear_operator
from torchlinop.articles import kind_of
from torchlinop.batches import Batch, is_one_batch, read, refuse_one_shot, tree_map
from torchlinop.command_line.report import place_of
from torchlinop.errors import OptionError
from torchlinop.losses.base import LossOfOutput
from torchlinop.losses.of_model import ForwardFn, LossOfModel
from torchlinop.losses.recognition import criterion, is_of_torch
from torchlinop.operators.base import CurvatureOperator
from torchlinop.operators.empirical_fisher import EmpiricalFisherOperator
from torchlinop.operators.fisher import FisherOperator
from torchlinop.operators.gauss_newton import GGNOperator
from torchlinop.operators.hessian import HessianOperator
from torchlinop.operators.kfac import EKFACOperator, KFACOperator
from torchlinop.parameters import match_names
from torchlinop.spectrum.by_name import pieces_for
from torchlinop.tensor_file import usable_device


@dataclass(frozen=True)
class Parts:
    """What a matrix is made of."""

    model: nn.Module
    data: Any
    loss: Any = None  # None: one that fits the batches
    forward: ForwardFn | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # of the operator


def parts_of(made: Any) -> Parts | None:
    """The parts that build() returned; None for what is an operator, or a dict of operators.

    Raises:
        OptionError: it has another form.
    """
    if isinstance(made, Mapping) and "model" in made:
        own = {name: made.get(name) for name in ("model", "data", "loss", "forward")}
        rest = {name: value for name, value in made.items() if name not in own}
        return _checked(Parts(**own, options=rest))  # type: ignore[arg-type]  # as checked
    if isinstance(made, tuple | list) and any(isinstance(part, nn.Module) for part in made):
        return _checked(_of_tuple(tuple(made)))
    if isinstance(made, nn.Module):
        raise OptionError(
            f"expected build() to return (model, data, loss), got {kind_of(made)} alone; "
            "return the data and the loss with it"
        )
    return None


def _of_tuple(made: tuple[Any, ...]) -> Parts:
    model, *others = made
    if len(others) == 1:
        return Parts(model, others[0])
    callables = [callable(part) for part in others]
    if len(others) != 2 or sum(callables) != 1:
        raise OptionError(
            "expected build() to return (model, data, loss), of which the loss can be called, got "
            f"({', '.join(type(part).__name__ for part in made)}); see torchlinop eigs --help"
        )
    data, loss = reversed(others) if callables[0] else others
    return Parts(model, data, loss)


def _checked(parts: Parts) -> Parts:
    if not isinstance(parts.model, nn.Module) or is_of_torch(parts.model):
        raise OptionError(
            f"expected the model of build() to be a torch.nn.Module, got "
            f"{kind_of(parts.model)}; return (model, data, loss)"
        )
    for name, value in (("loss", parts.loss), ("forward", parts.forward)):
        if isinstance(value, type):
            raise OptionError(
                f"expected the {name} of build() to be a function, got the class {value.__name__}; "
                f"return one of it, {value.__name__}()"
            )
        if value is not None and not callable(value):
            raise OptionError(
                f"expected the {name} of build() to be a function, got {kind_of(value)}; "
                "see torchlinop eigs --help"
            )
    if parts.data is None or isinstance(parts.data, str) or callable(parts.data):
        raise OptionError(
            f"expected the data of build() to be batches, got {kind_of(parts.data)}; "
            "return a DataLoader, a list of batches, or one batch"
        )
    return parts


def operator_for(made: Any, options: argparse.Namespace) -> CurvatureOperator:
    """The matrix that --operator, --params, --device, --dtype and --seed ask for.

    Raises:
        OptionError: build() returned something else, or nothing that has such a matrix; and as
            the operators.
    """
    parts = parts_of(made)
    if parts is None:
        return _given(made, options)
    placed = prepared(parts, options)
    return assembled(placed, options.operator or "hessian")


def prepared(parts: Parts, options: argparse.Namespace) -> Parts:
    """The parts on --device, in --dtype, with --params and --seed among the options.

    Raises:
        OptionError: no such device.
    """
    device = None if options.device is None else usable_device(options.device)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    for module in (parts.model, parts.loss):
        if isinstance(module, nn.Module):
            module.to(device=device, dtype=dtype)
    chosen: dict[str, Any] = {"seed": options.seed} | dict(parts.options)
    if options.params:
        chosen["param_filter"] = match_names(*options.params)
    data = parts.data if dtype is None else _cast(parts.data, dtype)
    return replace(parts, data=data, options=chosen)


def assembled(parts: Parts, kind: str) -> CurvatureOperator:
    """The operator of this kind.

    Raises:
        OptionError: it needs the outputs of the model apart from the loss; and as the operator.
    """
    if _is_whole(parts):
        if kind not in _OF_LOSS:
            raise OptionError(
                f"expected a loss of the model's outputs for --operator {kind}, got a function of "
                "(model, batch); return a loss of torch, as nn.CrossEntropyLoss(), or a dict with "
                '"forward" and a "loss" of (outputs, batch)'
            )
        return _of_function(parts, kind)
    data, first = _first_of(parts)
    given = parts.loss
    if isinstance(given, nn.Module) and not isinstance(given, LossOfOutput) and not parts.forward:
        given = criterion(given)
    forward, loss = pieces_for(parts.model, first, parts.forward, given)
    return _OF_OUTPUTS[kind](parts.model, data, forward, loss, **parts.options)


def _of_function(parts: Parts, kind: str) -> CurvatureOperator:
    try:
        return _OF_LOSS[kind](parts.model, parts.data, parts.loss, **parts.options)
    except (TypeError, AttributeError) as error:
        raise OptionError(
            f"loss(model, batch) raised {type(error).__name__}: {error} ({place_of(error)}); for a "
            'function of (outputs, batch) return a dict with "forward", for one of (outputs, '
            "targets) a module, as nn.CrossEntropyLoss()"
        ) from error


def _is_whole(parts: Parts) -> bool:
    """Whether the loss is a function of (model, batch)."""
    of_outputs = isinstance(parts.loss, LossOfOutput | nn.Module) or is_of_torch(parts.loss)
    return parts.loss is not None and parts.forward is None and not of_outputs


def _first_of(parts: Parts) -> tuple[Any, Batch]:
    """The data, which can be read again, and their first batch."""
    data = parts.data
    if isinstance(data, Iterator):
        if not parts.options.get("pin_data", True):
            refuse_one_shot(data)
        data = list(data)
    return data, next(read(data, 1, torch.device("cpu")), ())


def _hessian_of_outputs(
    model: nn.Module, data: Any, forward: ForwardFn, loss: LossOfOutput, **options: Any
) -> HessianOperator:
    return HessianOperator(model, data, LossOfModel(forward, loss), **options)


_OF_LOSS: Mapping[str, Callable[..., CurvatureOperator]] = {
    "hessian": HessianOperator,
    "empirical-fisher": EmpiricalFisherOperator,
}
_OF_OUTPUTS: Mapping[str, Callable[..., CurvatureOperator]] = {
    "hessian": _hessian_of_outputs,
    "ggn": GGNOperator,
    "fisher": FisherOperator,
    "empirical-fisher": EmpiricalFisherOperator,
    "kfac": KFACOperator,
    "ekfac": EKFACOperator,
}
KINDS = tuple(_OF_OUTPUTS)


def _given(made: Any, options: argparse.Namespace) -> CurvatureOperator:
    """The operator that build() returned, restricted to --params."""
    for name in ("operator", "device", "dtype"):
        if getattr(options, name) is not None:
            raise OptionError(
                f"build() returned {kind_of(made)}, which has its own {name}; leave out "
                f"--{name}, or return (model, data, loss)"
            )
    operator = _as_operator(made)
    return operator.restrict(match_names(*options.params)) if options.params else operator


def _as_operator(made: Any) -> CurvatureOperator:
    if isinstance(made, CurvatureOperator):
        return made
    if isinstance(made, Mapping):
        raise OptionError(
            "expected the dict of build() to have the keys model, data and loss, got "
            f"{', '.join(map(str, made)) or 'none'}; see torchlinop eigs --help"
        )
    if not hasattr(made, "shape"):
        raise OptionError(
            "expected build() to return (model, data, loss), a dict of these, or an operator, got "
            f"{kind_of(made)}; see torchlinop eigs --help"
        )
    return from_linear_operator(made)


class _Cast:  # a dataclass would be taken for a batch
    """Batches with their floating-point tensors in another dtype, as often as they are read."""

    def __init__(self, data: Iterable[Batch], dtype: torch.dtype) -> None:
        self.data, self.dtype = data, dtype

    def __iter__(self) -> Iterator[Batch]:
        return (_in_dtype(batch, self.dtype) for batch in self.data)


def _cast(data: Any, dtype: torch.dtype) -> Any:
    if is_one_batch(data):
        return _in_dtype(data, dtype)
    if isinstance(data, list):
        return [_in_dtype(batch, dtype) for batch in data]
    if isinstance(data, Iterator):
        return (_in_dtype(batch, dtype) for batch in data)
    return _Cast(data, dtype)


def _in_dtype(batch: Batch, dtype: torch.dtype) -> Batch:
    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return tree_map(cast, batch)
