"""Which part of a batch holds the inputs, the targets, the variances."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchlinop.batches import Batch, describe
from torchlinop.errors import BatchError
from torchlinop.weighting import LABELS

TARGETS = LABELS
VARIANCES = ("var", "variance", "variances")
INPUTS = ("inputs", "input", "x", "image", "images")


def targets_of(batch: Batch) -> Tensor:
    """The targets: the second part of a tuple or list, or the part under a usual name.

    Raises:
        BatchError: there is no such part.
    """
    return _part(batch, 1, TARGETS)


def variance_of(batch: Batch) -> Tensor:
    """The variances of Gaussian targets: the third part of a tuple or list, or ``var``, say.

    Raises:
        BatchError: there is no such part.
    """
    return _part(batch, 2, VARIANCES)


def named_parts(batch: Batch) -> Mapping[str, Any] | None:
    """The parts of a mapping or dataclass by name; None for batches that go by position.

    A named tuple goes by name if a field has a usual name of targets.
    """
    if isinstance(batch, Mapping):
        return batch
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    if isinstance(batch, tuple) and {*TARGETS} & {*getattr(batch, "_fields", ())}:
        return dict(zip(batch._fields, batch, strict=True))  # type: ignore[attr-defined]
    return None


def own(weight: Tensor | None) -> Tensor | None:
    """A copy of a loss's weights: the user may go on changing them in place."""
    return None if weight is None else weight.detach().clone()


def anywhere(condition: Tensor) -> bool:
    """Whether it holds for an entry; False under vmap, where values cannot be asked for."""
    return not torch._C._functorch.is_batchedtensor(condition) and bool(condition.any())


def unclear(batch: Batch) -> BatchError:
    """The error for a batch whose parts have no names known here."""
    return BatchError(
        f"could not tell inputs from targets in {describe(batch)}. Give loss_fn(model, batch), "
        "or forward_fn and loss_of_output_fn; a list holds batches, [(inputs, targets)]."
    )


def _part(batch: Batch, position: int, names: Sequence[str]) -> Tensor:
    named = named_parts(batch)
    if named is not None:
        parts = [named[name] for name in names if name in named]
    else:
        parts = list(batch[position : position + 1]) if isinstance(batch, tuple | list) else []
    if not parts or not isinstance(parts[0], Tensor):
        raise unclear(batch)
    return parts[0]
