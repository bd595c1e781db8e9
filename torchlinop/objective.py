"""f(θ) = Σ_b w_b L_b(θ) / Σ_b w_b, the weighted mean loss over fixed data, of one flat vector θ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import Tensor, nn

from torchlinop.batches import Batch
from torchlinop.data import WeightedData, pinned_data, reread_data
from torchlinop.derivatives import ScalarFunction
from torchlinop.diagnosis import second_derivatives_explained
from torchlinop.errors import LossShapeError, NonDeterministicDataError, NonFiniteError, OptionError
from torchlinop.model_state import BorrowedModel, Mode, unwrap
from torchlinop.parameters import ParameterLayout, ParamFilter
from torchlinop.random_state import preserved_random_state, reseed
from torchlinop.space import VectorSpace
from torchlinop.weighting import BATCH_MEAN, Weighting, find_weighting

LossFn = Callable[[nn.Module, Any], Tensor]
WeightingName = Literal["auto", "batch-mean"]


class ObjectiveOptions(TypedDict, total=False):
    """Keywords of every operator that is built from a model and data."""

    param_filter: ParamFilter | None  # which trainable parameters; all by default
    full_dataset: bool  # False takes num_batches batches, or the first alone; default True
    num_batches: int | None  # at most so many batches; all by default
    microbatch_size: int | None  # samples that go through the model at once; changes no matrix
    mode: Mode  # "eval" (default) or "train", with a pinned dropout mask for every batch
    weight: Callable[[Batch], float] | None  # loss terms of a batch; found by measurement
    weighting: WeightingName  # "auto" (default), or "batch-mean": every batch counts the same
    pin_data: bool  # True (default) reads the data once and keeps them on the device
    seed: int  # of whatever the model or loss draws at random; default 0


def _of_one_process(total: Tensor) -> Tensor:
    return total


@dataclass(frozen=True)
class Objective:
    """The function that is differentiated, the point, and the data."""

    function: LossFn  # (model, batch) -> scalar
    model: BorrowedModel
    layout: ParameterLayout
    theta: Tensor  # (n,), a copy: the user may go on training
    space: VectorSpace
    data: WeightedData
    reduce: Callable[[Tensor], Tensor] = _of_one_process  # sums a mean over processes

    @classmethod
    @torch.inference_mode(False)
    def of(
        cls,
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
    ) -> Objective:
        """Copy the parameters, read the data, and find out how much each batch counts.

        Raises:
            NoParametersError, ParameterError, OptionError, DataError, LossShapeError.
        """
        _refuse_bad_options(num_batches, microbatch_size, weight, weighting)
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
            return find_weighting(batches, evaluate, _roundoff(layout.precision))

        def evaluate(batch: Batch) -> Tensor:
            # In eval mode always: dropout would hide how the loss is reduced.
            with borrowed.borrowed(mode="eval"), torch.no_grad():
                return _scalar(loss_fn(borrowed.place(layout.split(theta)), batch))

        read = pinned_data if pin_data else reread_data
        data = read(dataloader, few, microbatch_size, theta.device, weighting_of)
        objective = cls(loss_fn, borrowed, layout, theta, space, data)
        if not pin_data:
            objective.refuse_changing_data()
        return objective

    @property
    def description(self) -> list[str]:
        """Facts for people: model and tensors, data and weights, mode."""
        layout, data = self.layout, self.data
        everything = len(layout.slots) + len(layout.frozen) + len(layout.filtered)
        mean = "mean" if data.weighting.mean else "sum"
        size = f"{data.samples:,} samples in " if data.samples else ""
        plural = "batch" if data.batches == 1 else "batches"
        return [
            f"{type(self.model.module).__name__}, {len(layout.slots)} of {everything} tensors",
            f"{size}{data.batches:,} {plural}, {mean} over {data.weighting.unit}",
            f"{self.model.mode} mode",
        ]

    def value(self, parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """L_b at parameters given by name; to be called while the model is borrowed."""
        return _scalar(self.function(self.model.place(parameters), batch))

    @contextmanager
    def evaluating(self, b: int, batch: Batch) -> Iterator[ScalarFunction]:
        """Borrow the model to differentiate ``θ ↦ L_b(θ)``, the function given."""

        def f(theta: Tensor) -> Tensor:
            return self.value(self.layout.split(theta), batch)

        with self.model.borrowed(b), self.explained(b, batch):
            yield f

    @contextmanager
    def explained(self, b: int, batch: Batch) -> Iterator[None]:
        """Say what autograd's complaints about second derivatives mean for this model."""

        def evaluate() -> Tensor:
            with self.model.borrowed(b):
                return self.value(self.layout.split(self.theta.clone().requires_grad_()), batch)

        with second_derivatives_explained(self.model.module, evaluate):
            yield

    def mean(self, term: Callable[[int, Batch], Tensor]) -> Tensor:
        """``Σ_b share_b term(b, batch)``, the only loop over data in the library.

        A term must be fresh memory: the first one is added to in place.
        """
        total: Tensor | None = None
        with closing(_generator(self.data)) as batches:
            for b, (batch, share) in enumerate(batches):
                part = term(b, batch)
                if total is None:
                    total = part if share == 1 else part.mul_(share)
                else:
                    total.add_(part, alpha=share)
        assert total is not None  # data with no batch are refused at construction
        return self.reduce(total)

    def loss(self) -> Tensor:
        """f(θ): a scalar tensor. One forward pass over the data."""

        def term(b: int, batch: Batch) -> Tensor:
            with self.evaluating(b, batch) as f, torch.no_grad():
                return f(self.theta).clone()

        return self.mean(term)

    def gradient(self) -> Tensor:
        """∇f(θ): (n,). One forward and backward pass over the data."""

        def term(b: int, batch: Batch) -> Tensor:
            with self.evaluating(b, batch) as f:
                theta = self.theta.clone().requires_grad_()
                (g,) = torch.autograd.grad(f(theta), theta)
            return g

        return self.mean(term)

    def refuse_non_finite(self, product: Tensor) -> None:
        """Raise NonFiniteError naming the batch and parameter that made ``product`` (n, k) so."""
        bad = int((~torch.isfinite(product)).sum())

        def locate(b: int, batch: Batch) -> Tensor:
            with self.evaluating(b, batch) as f:
                theta = self.theta.clone().requires_grad_()
                loss = f(theta)
                (g,) = torch.autograd.grad(loss, theta)
            for name, piece in self.layout.unflatten(g).items():
                if not (torch.isfinite(loss) and torch.isfinite(piece).all()):
                    raise NonFiniteError(
                        f"H v has {bad} NaN or infinite entries: in batch {b} the loss is "
                        f"{float(loss):.4g} and the gradient of {name} is not finite. "
                        "Clean this batch, or the parameters"
                    )
            return g

        self.mean(locate)
        raise NonFiniteError(
            f"H v has {bad} NaN or infinite entries, though loss and gradient are finite: "
            "a second derivative is singular, as that of sqrt or norm at 0. Smooth it there"
        )

    def refuse_changing_data(self) -> None:
        """Raise NonDeterministicDataError unless two passes, drawn differently, agree."""
        with preserved_random_state(self.space.device):
            values = []
            for seed in (0, 1):
                reseed(seed)
                values.append(float(self.loss()))
        tolerance = 1000 * _roundoff(self.layout.precision) * max(map(abs, values))
        if not abs(values[0] - values[1]) <= tolerance:
            raise NonDeterministicDataError(
                f"two passes over the data gave different objectives "
                f"({values[0]:.6g}, {values[1]:.6g}). Cause: {self.data.why_passes_differ}. "
                f"Pass pin_data=True or shuffle=False"
            )


def _generator(data: WeightedData) -> Any:
    yield from data


def _roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _scalar(loss: object) -> Tensor:
    if not isinstance(loss, Tensor):
        raise LossShapeError(
            f"loss_fn returned a {type(loss).__name__}, expected a scalar tensor; "
            "return its .loss if it is a model output, and no float"
        )
    if loss.numel() != 1:
        raise LossShapeError(
            f"loss_fn returned shape {tuple(loss.shape)}, expected a scalar. "
            'Use reduction="mean", or return loss.mean()'
        )
    return loss.reshape(())


def _refuse_bad_options(
    num_batches: int | None,
    microbatch_size: int | None,
    weight: object,
    weighting: str,
) -> None:
    for name, number in (("num_batches", num_batches), ("microbatch_size", microbatch_size)):
        if number is not None and number < 1:
            raise OptionError(f"expected {name} to be at least 1, got {number}")
    if weighting not in get_args(WeightingName):
        raise OptionError(
            f"unknown weighting {weighting!r}; choose one of {', '.join(get_args(WeightingName))}"
        )
    if weight is not None and not callable(weight):
        raise OptionError(
            f"expected weight to be a function of a batch, got {weight!r}; "
            "pass weight=lambda batch: len(batch[1])"
        )
