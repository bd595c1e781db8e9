"""f(θ) = Σ_b w_b L_b(θ) / Σ_b w_b, the weighted mean loss over fixed data, of one flat vector θ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchlinop.articles import kind_of
from torchlinop.batches import Batch, detached_copy, shell
from torchlinop.data import WeightedData
from torchlinop.derivatives import Function, gradient_of
from torchlinop.diagnosis import second_derivatives_explained
from torchlinop.errors import LossShapeError
from torchlinop.model_state import BorrowedModel
from torchlinop.parameters import ParameterLayout
from torchlinop.progress import batches_shown
from torchlinop.ranks import ALONE, Ranks
from torchlinop.space import VectorSpace

LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Objective:
    """The function that is differentiated, the point, and the data."""

    function: LossFn  # (model, batch) -> scalar
    model: BorrowedModel
    layout: ParameterLayout
    theta: Tensor  # (n,), a copy: the user may go on training
    space: VectorSpace
    data: WeightedData
    ranks: Ranks = ALONE  # that have the data between them
    writes: bool = True  # whether evaluations may write into their batch, which is copied then

    @property
    def description(self) -> list[str]:
        """Facts for people: model and tensors, data and weights, mode."""
        layout, data = self.layout, self.data
        everything = len(layout.slots) + len(layout.frozen) + len(layout.filtered)
        mean = "mean" if data.weighting.mean else "sum"
        samples, batches = data.whole.samples, data.whole.batches
        size = f"{samples:,} sample{'s' * (samples != 1)} in " if samples else ""
        plural = "batch" if batches == 1 else "batches"
        return [
            f"{type(self.model.module).__name__}, {len(layout.slots)} of {everything} tensors",
            f"{size}{batches:,} {plural}, {mean} over {data.weighting.unit}",
            f"{self.model.mode} mode",
            *filter(None, [self.ranks.name]),
        ]

    def value(self, parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """L_b at parameters given by name; to be called while the model is borrowed."""
        return scalar(self.function(self.model.place(parameters), self.fresh(batch)))

    def frozen(self) -> list[Tensor]:
        """The parameters that are used where they are."""
        return [self.model.module.get_parameter(name) for name in self.layout.frozen]

    def fresh(self, batch: Batch) -> Batch:
        """The batch for one evaluation, which may write into it, or take parts out of it."""
        return detached_copy(batch) if self.writes else shell(batch)

    @contextmanager
    def evaluating(
        self, b: int, batch: Batch, of: Callable[[nn.Module, Batch], Tensor] | None = None
    ) -> Iterator[Function]:
        """Borrow the model to differentiate ``θ ↦ L_b(θ)``, the function given.

        ``of(model, batch)`` takes the place of the loss: the model's outputs, say.
        """

        def value(model: nn.Module, batch: Batch) -> Tensor:
            return scalar(self.function(model, batch))

        function = of or value

        def f(theta: Tensor) -> Tensor:
            return function(self.model.place(self.layout.split(theta)), self.fresh(batch))

        with self.model.borrowed(self.data.before.batches + b), self.explained(b, batch):
            yield f

    @contextmanager
    def explained(self, b: int, batch: Batch) -> Iterator[None]:
        """Say what autograd's complaints about second derivatives mean for this model."""

        def evaluate() -> Tensor:
            with self.model.borrowed(self.data.before.batches + b):
                return self.value(self.layout.split(self.theta.clone().requires_grad_()), batch)

        with second_derivatives_explained(self.model.module, evaluate):
            yield

    def mean(self, term: Callable[[int, Batch], Tensor], given: Tensor) -> Tensor:
        """``Σ_b share_b term(b, batch)`` over the batches of all processes.

        ``given`` has the shape of a term, and is the same in all processes: a vector that was
        multiplied, say. A term must be fresh memory: the first one is added to in place.
        """
        return self.ranks.sum(lambda: self.mean_here(term), given)

    def mean_here(self, term: Callable[[int, Batch], Tensor]) -> Tensor:
        """What the batches of this process add to it; the only loop over data in the library."""
        total: Tensor | None = None
        with closing(_generator(self.data)) as batches:
            shown = batches_shown(batches, self.data.own.batches)
            for b, (batch, share) in enumerate(shown):
                part = term(b, batch)
                if total is None:
                    total = part if share == 1 else part.mul_(share)
                else:
                    total.add_(part, alpha=share)
        assert total is not None  # data with no batch are refused at construction
        return total

    def loss(self) -> Tensor:
        """f(θ): a scalar tensor. One forward pass over the data."""

        def term(b: int, batch: Batch) -> Tensor:
            with self.evaluating(b, batch) as f, torch.no_grad():
                return f(self.theta).clone()

        return self.mean(term, self.theta.new_zeros(()))

    def gradient(self) -> Tensor:
        """∇f(θ): (n,). One forward and backward pass over the data."""

        def term(b: int, batch: Batch) -> Tensor:
            with self.evaluating(b, batch) as f:
                return gradient_of(f, self.theta)

        return self.mean(term, self.theta)


def _generator(data: WeightedData) -> Any:
    yield from data


def scalar(loss: object) -> Tensor:
    """What a loss function returned, as a tensor of shape (); LossShapeError if it is no scalar."""
    if not isinstance(loss, Tensor):
        raise LossShapeError(
            f"loss_fn returned {kind_of(loss)}, expected a scalar tensor; "
            "return its .loss if it is a model output, and no float"
        )
    if loss.is_complex():
        raise LossShapeError(
            f"loss_fn returned {loss.dtype}, expected a real scalar; return its .real, or .abs()"
        )
    if loss.numel() != 1:
        raise LossShapeError(
            f"loss_fn returned shape {tuple(loss.shape)}, expected a scalar. "
            'Use reduction="mean", or return loss.mean()'
        )
    return loss.reshape(())
