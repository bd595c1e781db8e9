"""One small model with shared weights under every loss of torch, in float64 and float32."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchlinop.testing.gallery import Problem, in_batches
from torchlinop.testing.oracles import (
    bernoulli_outcomes,
    class_outcomes,
    two_point_outcomes,
)

N, SIZES = 11, (5, 4, 2)
REDUCTIONS = ("mean", "sum")
# Float32 represents them, so that both precisions are asked for the same matrix.
CLASS_WEIGHTS = torch.tensor([0.25, 1.0, 3.0])
POSITIVE_WEIGHTS = torch.tensor([0.5, 1.0, 4.0])


@dataclass(frozen=True)
class Loss:
    """A loss of torch, what the data have beside the inputs, and whose likelihood it is."""

    module: type[nn.Module]
    targets: Callable[[], tuple[Tensor, ...]]
    options: dict[str, Any] = field(default_factory=dict)
    # (outputs, *targets) -> what might have been observed; None: not a likelihood
    outcomes: Callable[..., Iterator[tuple[Tensor, Tensor]]] | None = None
    # *targets -> the weight (N,) of a loss term, or (N, C) of its entries
    term_weights: Callable[..., Tensor] = lambda *targets: torch.ones(())
    likelihood: nn.Module | None = None  # without these weights; None: the loss itself
    head: Callable[[], nn.Module] = nn.Identity
    canonical: bool = True  # its Hessian does not depend on the target: the Fisher is the GGN

    def criterion(self, reduction: str) -> nn.Module:
        return self.module(reduction=reduction, **self.options).double()

    def terms(self, outputs: Tensor, drawn: Tensor, targets: tuple[Tensor, ...]) -> Tensor:
        """The negative log-likelihoods (N,) of drawn targets, times the roots of the weights."""
        likelihood = copy.copy(self.likelihood or self.criterion("mean"))
        likelihood.reduction = "none"
        losses = likelihood(outputs, drawn, *targets[1:])
        weighted = self.term_weights(*targets).sqrt() * losses
        per_entry = losses.ndim > 1 and not isinstance(likelihood, nn.CrossEntropyLoss)
        return (weighted.sum(-1) if per_entry else weighted).flatten()


def labels(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randint(0, 3, (N, *shape)),)


def masked() -> tuple[Tensor, ...]:
    """Labels of which batches and microbatches hold different numbers, none or one."""
    y = torch.randint(0, 3, (N,))
    y[::3] = -100
    y[-4:-1] = -100
    y[-1:] = 1
    return (y,)


def soft() -> tuple[Tensor, ...]:
    """Probabilities in eighths, whose sum is one in float32 too."""
    first, second = torch.randint(1, 4, (2, N))
    return (torch.stack([first, second, 8 - first - second], dim=1) / 8,)


def numbers() -> tuple[Tensor, ...]:
    return (torch.randn(N, 3),)


def bits() -> tuple[Tensor, ...]:
    return (torch.randint(0, 2, (N, 3)).float(),)


def counts() -> tuple[Tensor, ...]:
    return (torch.poisson(torch.full((N, 3), 2.0)),)


def with_variances() -> tuple[Tensor, ...]:
    return torch.randn(N, 3), torch.rand(N, 3) + 0.5


def two_positions() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.Unflatten(1, (3, 2)))


def of_classes(
    targets: Callable[[], tuple[Tensor, ...]],
    term_weights: Callable[..., Tensor] = lambda y: torch.ones(()),
    head: Callable[[], nn.Module] = nn.Identity,
    **options: Any,
) -> Loss:
    return Loss(
        nn.CrossEntropyLoss,
        targets,
        options,
        lambda f, y: class_outcomes(f),
        term_weights,
        nn.CrossEntropyLoss(),
        head,
    )


ROOT_HALF = torch.tensor(0.5).double().sqrt()  # the deviation whose likelihood is (f − y)²

LOSSES = {
    "cross-entropy": of_classes(labels()),
    "class weights": of_classes(
        labels(), lambda y: CLASS_WEIGHTS.double()[y], weight=CLASS_WEIGHTS
    ),
    "ignored labels": of_classes(masked, lambda y: (y >= 0).double()),
    "class weights and ignored labels": of_classes(
        masked,
        lambda y: CLASS_WEIGHTS.double()[y.clamp_min(0)] * (y >= 0),
        weight=CLASS_WEIGHTS,
    ),
    "label smoothing": of_classes(labels(), label_smoothing=0.125),
    "soft targets": of_classes(soft),
    "classes of two positions": of_classes(labels(2), head=two_positions),
    "squared error": Loss(
        nn.MSELoss, numbers, outcomes=lambda f, y: two_point_outcomes(f, ROOT_HALF)
    ),
    "binary cross-entropy": Loss(
        nn.BCEWithLogitsLoss, bits, outcomes=lambda f, y: bernoulli_outcomes(f)
    ),
    "binary cross-entropy, positives weighted": Loss(
        nn.BCEWithLogitsLoss,
        bits,
        {"pos_weight": POSITIVE_WEIGHTS},
        lambda f, y: bernoulli_outcomes(f),
        lambda y: y * POSITIVE_WEIGHTS.double() + 1 - y,
        nn.BCEWithLogitsLoss(),
    ),
    "Huber": Loss(nn.HuberLoss, numbers, {"delta": 0.75}),
    "smooth L1": Loss(nn.SmoothL1Loss, numbers, {"beta": 0.75}),
    "Poisson": Loss(
        nn.PoissonNLLLoss,
        counts,
        outcomes=lambda f, y: two_point_outcomes(f.exp(), f.exp().sqrt()),
    ),
    "Poisson of rates": Loss(
        nn.PoissonNLLLoss,
        counts,
        {"log_input": False, "eps": 0.0},
        lambda f, y: two_point_outcomes(f, f.sqrt()),
        head=nn.Softplus,
        canonical=False,
    ),
    "Gaussian NLL": Loss(
        nn.GaussianNLLLoss,
        with_variances,
        outcomes=lambda f, y, var: two_point_outcomes(f, var.sqrt()),
    ),
}


class MeanOfSteps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


@functools.cache
def problem(loss: str, reduction: str, dtype: torch.dtype = torch.float64) -> Problem:
    """Two layers, the first of which is applied at two steps of every sample (n = 27, or more).

    In float64, the numbers are those of float32.
    """
    torch.manual_seed(21)
    model = nn.Sequential(
        nn.Linear(4, 3), nn.Tanh(), MeanOfSteps(), nn.Linear(3, 3), LOSSES[loss].head()
    )
    parts = (torch.randn(N, 2, 4), *LOSSES[loss].targets())
    full = tuple(t.to(dtype) if t.is_floating_point() else t for t in parts)
    criterion = LOSSES[loss].criterion(reduction).to(dtype)

    def loss_fn(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return criterion(model(batch[0]), *batch[1:])

    return Problem(model.to(dtype), in_batches(full, *SIZES), loss_fn, full, criterion=criterion)
