"""From what users call a loss to a LossOfOutput: torch's modules and functionals are known."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from torchlinop.articles import kind_of
from torchlinop.errors import OptionError
from torchlinop.losses.autograd import AutogradLoss, WithHvp
from torchlinop.losses.base import LossOfOutput
from torchlinop.losses.binary_cross_entropy import BinaryCrossEntropyWithLogits
from torchlinop.losses.cross_entropy import CrossEntropy
from torchlinop.losses.given import OfBatch, OfTargets, Targets, unchanged
from torchlinop.losses.poisson import PoissonNLL, PoissonRateNLL
from torchlinop.losses.real_targets import GaussianNLL, Huber, MeanSquaredError, SmoothL1
from torchlinop.losses.targets import targets_of

log = logging.getLogger("torchlinop")


@dataclass(frozen=True)
class _Known:
    """A loss of torch, as module and as function, and the same loss here."""

    module: type[nn.Module]
    function: Callable[..., Tensor]
    options: tuple[str, ...]  # attributes of the module, keywords of the function and of ours
    ours: Callable[..., LossOfOutput]

    def options_of(self, loss: object) -> Mapping[str, Any] | None:
        """The options of ``loss`` if it is this one, with nothing changed and nothing unknown."""
        function, keywords = _unwrapped(loss)
        if isinstance(function, self.module):
            same = type(function).forward is self.module.forward
            same = same and "forward" not in vars(function) and not keywords
            return {name: getattr(function, name) for name in self.options} if same else None
        return (
            keywords if function is self.function and keywords.keys() <= {*self.options} else None
        )


def _poisson(*, log_input: bool = True, eps: float = 1e-8, **options: Any) -> LossOfOutput:
    return PoissonNLL(**options) if log_input else PoissonRateNLL(eps=eps, **options)


_KNOWN = (
    _Known(
        nn.CrossEntropyLoss,
        F.cross_entropy,
        ("weight", "ignore_index", "label_smoothing", "reduction"),
        CrossEntropy,
    ),
    _Known(nn.MSELoss, F.mse_loss, ("reduction",), MeanSquaredError),
    _Known(
        nn.BCEWithLogitsLoss,
        F.binary_cross_entropy_with_logits,
        ("weight", "pos_weight", "reduction"),
        BinaryCrossEntropyWithLogits,
    ),
    _Known(nn.HuberLoss, F.huber_loss, ("delta", "reduction"), Huber),
    _Known(nn.SmoothL1Loss, F.smooth_l1_loss, ("beta", "reduction"), SmoothL1),
    _Known(
        nn.PoissonNLLLoss,
        F.poisson_nll_loss,
        ("log_input", "full", "eps", "reduction"),
        _poisson,
    ),
    _Known(nn.GaussianNLLLoss, F.gaussian_nll_loss, ("full", "eps", "reduction"), GaussianNLL),
)


def loss_of_output(loss: object) -> LossOfOutput:
    """The loss as a LossOfOutput, in closed form where it is one of torch's known here.

    Knows torch's modules and functionals, ``functools.partial`` of these with keywords, objects
    with a method ``hvp(outputs, batch, u)``, and any other ``(outputs, batch) -> scalar``. Their
    weights are copied; a module of the user's is found with its buffers as they are now, and left
    as it was.

    Raises:
        OptionError: it cannot be called, gives no scalar (``reduction="none"``), or takes more
            than outputs and batch.
    """
    if isinstance(loss, LossOfOutput):
        return loss
    if is_of_torch(loss):
        return criterion(loss)
    _refuse_uncallable(loss)
    _refuse_more_arguments(loss, "batch")
    kind = WithHvp if hasattr(loss, "hvp") else AutogradLoss
    log.info("%r is differentiated by %s", loss, "its own hvp" if kind is WithHvp else "autograd")
    return kind(OfBatch(unchanged(loss)))


def criterion(loss: object, targets: Targets = targets_of) -> LossOfOutput:
    """The same for ``(outputs, targets) -> scalar``, the targets taken from the batch.

    Raises:
        OptionError: as ``loss_of_output``.
    """
    if isinstance(loss, LossOfOutput):
        return loss
    _refuse_unreduced(loss)
    for known in _KNOWN:
        options = known.options_of(loss)
        if options is not None:
            return known.ours(targets=targets, **options)
    _refuse_uncallable(loss)
    _refuse_more_arguments(loss, "targets")
    log.info("%r is no loss known in closed form: it is differentiated by autograd", loss)
    return AutogradLoss(OfTargets(unchanged(loss), targets))


def _unwrapped(loss: object) -> tuple[object, Mapping[str, Any]]:
    """A function and the keywords that ``functools.partial`` gave it."""
    if isinstance(loss, functools.partial) and not loss.args:
        return loss.func, loss.keywords
    return loss, {}


def is_of_torch(loss: object) -> bool:
    """Whether it is called with (outputs, targets), as torch's losses and their children are."""
    function, _ = _unwrapped(loss)
    return isinstance(function, _Loss) or getattr(function, "__module__", "") == F.__name__


def _refuse_unreduced(loss: object) -> None:
    function, keywords = _unwrapped(loss)
    if "none" in (keywords.get("reduction"), getattr(function, "reduction", None)):
        raise OptionError(
            f'expected a loss that gives a scalar, got {loss!r} with reduction="none"; '
            'pass reduction="mean" or "sum"'
        )


def _refuse_uncallable(loss: object) -> None:
    if not callable(loss):
        raise OptionError(
            f"expected a loss that can be called, got {kind_of(loss)}; pass "
            "nn.CrossEntropyLoss(), say, or a function (outputs, batch) -> scalar"
        )


def _refuse_more_arguments(loss: Any, second: str) -> None:
    required = _required_arguments(loss)
    if len(required) > 2:
        raise OptionError(
            f"expected a loss of (outputs, {second}), got {loss!r}, which takes "
            f"({', '.join(required)}); give loss_of_output_fn a function (outputs, batch) that "
            "finds them in the batch"
        )


def _required_arguments(loss: Any) -> list[str]:
    """Names of the positional arguments without default; none where they cannot be known."""
    try:
        signature = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
    except (TypeError, ValueError):  # written in C++, say
        return []
    return [
        p.name
        for p in signature.parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
