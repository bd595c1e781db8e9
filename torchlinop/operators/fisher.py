"""F = Σ_n ω_n E[g_n g_nᵀ], the expectation over targets drawn from the model's own distribution."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from torchlinop.batches import Batch, count_samples
from torchlinop.counter_random import uniform
from torchlinop.errors import OptionError, SampleMixingError
from torchlinop.from_model import output_objective, refuse_bad_seed
from torchlinop.losses.base import LossOfOutput, OutputMap, Terms
from torchlinop.losses.of_model import ForwardFn
from torchlinop.operators.gauss_newton import GaussNewtonProducts, Metric
from torchlinop.operators.of_objective import ObjectiveOperator, ProductOptions, planned
from torchlinop.per_sample import refuse_mixed_samples


class FisherOperator(ObjectiveOperator):
    """The Fisher information matrix ``Σ_n ω_n E[g_n g_nᵀ]`` of the model's own distribution.

    g_n is the gradient of loss term n with its target drawn from the distribution whose negative
    log-likelihood the loss is: categorical for cross-entropy, normal with variance 1/2 for the
    squared error, Bernoulli for binary cross-entropy, Poisson, normal. ω_n are the weights of the
    terms in the loss; class weights weigh the observed term, so that the expectation is the same
    exact matrix, the type-2 Fisher. For these losses it equals the GGN (but for a Poisson rate
    given as such).

    Args:
        model, dataloader, forward_fn, loss_of_output_fn: as for ``GGNOperator``.
        mc_samples: None takes the expectation exactly; a number draws as many targets for every
            term, once: one fixed matrix, whose expectation is the exact one. The draws belong to
            the samples: batch and microbatch sizes do not change them.
        sampling_seed: of these draws.
        **options: see ``ProductOptions``.

    Costs as much as ``GGNOperator``; Monte Carlo keeps (or rebuilds) one gradient with respect to
    the outputs for every draw.

    Raises:
        OptionError: the loss is the negative log-likelihood of no distribution known here.
        SampleMixingError: samples depend on each other.
        TorchlinopError: as ``GGNOperator``.

    Source: Martens, New insights and perspectives on the natural gradient method, JMLR 21 (2020).
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[Batch],
        forward_fn: ForwardFn,
        loss_of_output_fn: Any,
        *,
        mc_samples: int | None = None,
        sampling_seed: int = 0,
        **options: Unpack[ProductOptions],
    ) -> None:
        if mc_samples is not None and not (isinstance(mc_samples, int) and mc_samples >= 1):
            raise OptionError(
                f"expected mc_samples to be an integer of at least 1, got {mc_samples!r}; "
                "leave it out for the exact expectation"
            )
        refuse_bad_seed("sampling_seed", sampling_seed)
        plan, rest = planned(options)
        objective = output_objective(model, dataloader, forward_fn, loss_of_output_fn, **rest)
        loss, outputs = objective.function.loss, objective.function.outputs
        loss.refuse_unless_likelihood()
        metric: Metric = Expectation(loss)
        if mc_samples is not None:
            refuse_mixed_samples(objective, outputs)
            objective.data.refuse_reordering()
            metric = MonteCarlo(loss, mc_samples, sampling_seed)
        work = GaussNewtonProducts(plan.derivative, outputs, metric)
        super().__init__(objective, work, plan, positive_semidefinite=True)


@dataclass(frozen=True)
class Expectation:
    """``M = Σ_n ω_n E[g_n g_nᵀ]``, g_n with respect to the outputs."""

    loss: LossOfOutput

    def __call__(self, outputs: Tensor, batch: Batch, start: int) -> OutputMap:
        return self.loss.fisher(outputs, batch)


@dataclass(frozen=True)
class MonteCarlo:
    """``M = Σ_n ω_n (1/S) Σ_s g_ns g_nsᵀ`` with S targets drawn for every term."""

    loss: LossOfOutput
    samples: int  # S
    seed: int

    def draws(self, outputs: Tensor, batch: Batch, start: int) -> list[Terms]:
        """The terms for every s, of samples numbered from ``start``."""

        def numbers(stream: int, shape: torch.Size) -> Tensor:
            # Outputs with several rows a sample, tokens say, are numbered within their sample.
            rows = max(1, shape[0] // max(1, count_samples(batch) or 1))
            if shape[0] % rows:
                raise SampleMixingError(
                    f"expected as many rows of outputs for every sample, got {shape[0]} for "
                    f"{count_samples(batch)} samples, whose draws cannot be told apart; return "
                    "outputs with a sample axis, and mask by the targets"
                )
            grouped = torch.Size((shape[0] // rows, rows, *shape[1:]))
            drawn = uniform(grouped, self.seed, stream, start, outputs.device)
            return drawn.reshape(shape)

        return [
            self.loss.sampled(outputs, batch, lambda shape, s=s: numbers(s, shape))  # type: ignore[misc]
            for s in range(self.samples)
        ]

    def __call__(self, outputs: Tensor, batch: Batch, start: int) -> OutputMap:
        maps = [terms.outer() for terms in self.draws(outputs, batch, start)]

        def product(u: Tensor) -> Tensor:
            total = maps[0](u.clone())
            for each in maps[1:]:
                total += each(u.clone())
            return total.div_(self.samples)

        return product
