"""Functions (model, batch) as users give them: what cannot be called so is refused by name."""

from __future__ import annotations

from torch import nn

from torchlinop.articles import kind_of
from torchlinop.errors import OptionError
from torchlinop.losses.recognition import is_of_torch
from torchlinop.signatures import takes

_INSTEAD = {
    "loss_fn": "pass torchlinop.losses.supervised_loss(nn.CrossEntropyLoss()), say, or "
    "lambda model, batch: criterion(model(batch[0]), batch[1])",
    "forward_fn": "pass torchlinop.losses.supervised_forward, or "
    "lambda model, batch: model(batch[0])",
}


def refuse_unfit_function(name: str, function: object) -> None:
    """Raise OptionError unless ``function`` can be called with a model and a batch.

    ``name`` is that of the argument, "loss_fn" or "forward_fn".
    """
    if is_of_torch(function):
        why = "takes outputs and targets"
    elif not callable(function):
        why = "cannot be called"
    elif not takes(function, 2):
        why = "does not take two arguments"
    else:
        return
    raise OptionError(
        f"expected {name} to be a function of (model, batch), got {_name(function)}, which {why}; "
        f"{_INSTEAD[name]}"
    )


def _name(function: object) -> str:
    if isinstance(function, nn.Module):
        return kind_of(function)
    return str(getattr(function, "__name__", repr(function)))
