"""From a model, data and a loss function to an objective: what is copied, read and weighted."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack, get_args

import torch
from torch import Tensor, nn

from torchlinop.batches import Batch, detached_copy
from torchlinop.choices import refuse_unknown, refuse_unknown_options
from torchlinop.data import WeightedData, pinned_data, reread_data
from torchlinop.errors import NonDeterministicDataError, NonFiniteError, OptionError
from torchlinop.losses.functions import refuse_unfit_function
from torchlinop.losses.of_model import ForwardFn, LossOfModel
from torchlinop.losses.recognition import loss_of_output
from torchlinop.model_state import BorrowedModel, Mode, unwrap
from torchlinop.objective import LossFn, Objective, scalar
from torchlinop.parameters import ParameterLayout, ParamFilter
from torchlinop.random_state import preserved_random_state, reseed
from torchlinop.settings import checks_wanted
from torchlinop.signatures import takes
from torchlinop.space import VectorSpace
from torchlinop.weighting import BATCH_MEAN, Weighting
from torchlinop.weighting_trials import find_weighting

log = logging.getLogger("torchlinop")

WeightingName = Literal["auto", "batch-mean"]


class ObjectiveOptions(TypedDict, total=False):
    """Keywords of every operator that is built from a model and data."""

    param_filter: ParamFilter | None  # which trainable parameters; all by default
    full_dataset: bool  # False takes num_batches batches, or the first alone; default True
    num_batches: int | None  # at most so many batches; all by default
    microbatch_size: int | None  # samples that go through the model at once; no other matrix
    mode: Mode  # "eval" (default) or "train", with a pinned dropout mask for every batch
    weight: Callable[[Batch], float] | None  # loss terms of a batch; found by measurement
    weighting: WeightingName  # "auto" (default), or "batch-mean": every batch counts the same
    # True (default) reads the data once and keeps them on the device. False reads them again for
    # every product: they have to stay the same, of which later passes compare only the counts.
    pin_data: bool
    seed: int  # of whatever the model or loss draws at random; default 0


def objective_from_model(
    model: nn.Module,
    dataloader: Iterable[Batch],
    loss_fn: LossFn,
    *,
    param_filter: ParamFilter | None = None,
    full_dataset: bool = True,
    num_batches: int | None = None,
    microbatch_size: int | None = None,
    mode: Mode = "eval",
    weight: Callable[[Batch], float] | None = None,
    weighting: WeightingName = "auto",
    pin_data: bool = True,
    seed: int = 0,
    of_samples: bool = False,
) -> Objective:
    """Copy the parameters, read the data, and find out how much each batch counts.

    With ``of_samples`` the weighting holds for every sample, also of a single batch.

    A loss with an attribute ``weighting`` says itself what a batch counts.

    Raises:
        NoParametersError, ParameterError, OptionError, DataError, LossShapeError.
    """
    refuse_unfit_function("loss_fn", loss_fn)
    refuse_bad_seed("seed", seed)
    refuse_bad_options(num_batches, microbatch_size, weight, weighting)
    known: Weighting | None = getattr(loss_fn, "weighting", None)
    with torch.inference_mode(False):  # what is copied will enter graphs
        module = unwrap(model)
        layout = ParameterLayout.of(module, param_filter)
        borrowed = BorrowedModel(module, layout, mode, seed)
        borrowed.warn_if_training()
        theta = layout.flatten(dict(module.named_parameters(remove_duplicate=False)))
        space = VectorSpace(layout.size, theta.dtype, theta.device)
        few = num_batches if full_dataset or num_batches else 1

        def weighting_of(batches: tuple[Batch, ...]) -> Weighting:
            if weight is not None:
                return Weighting(weight, "weights")
            if weighting == "batch-mean":
                return BATCH_MEAN
            return known or find_weighting(batches, evaluate, of_samples=of_samples)

        def evaluate(batch: Batch) -> Tensor:
            # In eval mode always: dropout would hide how the loss is reduced.
            with borrowed.borrowed(mode="eval"), torch.no_grad():
                model = borrowed.place(layout.split(theta))
                return scalar(loss_fn(model, detached_copy(batch)))

        read = pinned_data if pin_data else reread_data
        data = read(dataloader, few, microbatch_size, theta.device, weighting_of)
        objective = Objective(loss_fn, borrowed, layout, theta, space, data)
        _log_decisions(model, objective)
        if not pin_data and checks_wanted():
            refuse_changing_data(objective.loss, data, layout.precision, space.device)
        return objective


def _log_decisions(model: nn.Module, objective: Objective) -> None:
    module, layout, dtype = objective.model.module, objective.layout, objective.space.dtype
    if module is not model:
        log.info("%s: the %s inside is evaluated", type(model).__name__, type(module).__name__)
    log.info("the matrix is that of %s", " | ".join(objective.description))
    log.info("its model is evaluated with %s", objective.model.describe())
    if layout.precision != dtype:
        log.info("vectors are in %s, though some parameters are in %s", dtype, layout.precision)
    if objective.data.pinned:
        log.info("the data are kept, on %s", objective.space.device)


@dataclass(frozen=True)
class OutputObjective(Objective):
    """An objective whose loss is known as a loss of the model's outputs."""

    function: LossOfModel


def output_objective(
    model: nn.Module,
    dataloader: Iterable[Batch],
    forward_fn: ForwardFn,
    loss_of_output_fn: Any,
    *,
    of_samples: bool = False,
    **options: Unpack[ObjectiveOptions],
) -> OutputObjective:
    """The objective ``loss_of_output_fn(forward_fn(model, batch), batch)``.

    ``loss_of_output_fn`` may be what ``loss_of_output`` recognises: a loss of torch, say. With
    ``of_samples`` its terms are known: a loss that does not know how it weighs its samples, by
    measurement.
    """
    refuse_unknown_options(options, ObjectiveOptions.__optional_keys__)
    refuse_unfit_function("forward_fn", forward_fn)
    function = LossOfModel(forward_fn, loss_of_output(loss_of_output_fn))
    whole = objective_from_model(model, dataloader, function, of_samples=of_samples, **options)
    if of_samples:
        function = LossOfModel(forward_fn, function.loss.with_weighting(whole.data.weighting))
    return OutputObjective(
        function, whole.model, whole.layout, whole.theta, whole.space, whole.data
    )


def refuse_changing_data(
    loss: Callable[[], Tensor], data: WeightedData, precision: torch.dtype, device: torch.device
) -> None:
    """Raise NonDeterministicDataError unless two passes, drawn differently, agree on the loss."""
    with preserved_random_state(device):
        values = []
        for seed in (0, 1):
            reseed(seed, device)
            values.append(float(loss()))
    if not all(map(math.isfinite, values)):
        raise NonFiniteError(
            f"the loss over all data is {values[0]:.4g}; clean the data, or the parameters"
        )
    tolerance = 1000 * torch.finfo(precision).eps * max(map(abs, values))
    if not abs(values[0] - values[1]) <= tolerance:
        raise NonDeterministicDataError(
            f"two passes over the data gave different objectives "
            f"({values[0]:.6g}, {values[1]:.6g}). Cause: {data.why_passes_differ}. "
            f"Pass pin_data=True or shuffle=False"
        )


def refuse_bad_seed(name: str, seed: object) -> None:
    """Raise OptionError unless ``seed`` is an integer of at least 0."""
    _refuse_below(name, seed, 0)


def _refuse_below(name: str, number: object, least: int) -> None:
    if not (isinstance(number, int) and number >= least):
        raise OptionError(
            f"expected {name} to be an integer of at least {least}, got {number!r}; "
            "pass such a number, or leave it out"
        )


def refuse_bad_options(
    num_batches: int | None,
    microbatch_size: int | None,
    weight: object,
    weighting: str,
) -> None:
    """Raise OptionError for a number, weighting or weight that is none."""
    for name, number in [("num_batches", num_batches), ("microbatch_size", microbatch_size)]:
        if number is not None:
            _refuse_below(name, number, 1)
    refuse_unknown("weighting", weighting, get_args(WeightingName))
    if weight is not None and not (callable(weight) and takes(weight, 1)):
        raise OptionError(
            f"expected weight to be a function of a batch, got {weight!r}; "
            "pass weight=lambda batch: len(batch[1])"
        )
