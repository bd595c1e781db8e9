"""Σ_v v vᵀ = M: the vectors of outputs that K-FAC backpropagates, whatever its Fisher type."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchlinop.batches import Batch
from torchlinop.losses.base import LossOfOutput
from torchlinop.operators.fisher import MonteCarlo

FisherType = Literal["type-2", "mc", "empirical", "forward-only"]

# (outputs, batch, number of the batch, N) -> vectors (k, *outputs.shape), some at a time
Vectors = Callable[[Tensor, Batch, int, int], Iterator[Tensor]]


@dataclass(frozen=True)
class HessianRoot:
    """``∇²L = Σ_v v vᵀ``: C vectors for every term of a sample.

    One term of each sample at a time: vectors that hold several terms of a sample would bring
    products of different terms into Σ_v (Jᵀ v)(Jᵀ v)ᵀ.
    """

    loss: LossOfOutput

    def __call__(self, outputs: Tensor, batch: Batch, b: int, samples: int) -> Iterator[Tensor]:
        dims = self.loss.terms(outputs.detach(), batch).dims
        return _one_term_at_a_time(self.loss.root(outputs.detach(), batch), dims, samples)


@dataclass(frozen=True)
class TermGradients:
    """``Σ_n ω_n g_n g_nᵀ = Σ_v v vᵀ`` with the gradients g_n of the loss terms."""

    loss: LossOfOutput

    def __call__(self, outputs: Tensor, batch: Batch, b: int, samples: int) -> Iterator[Tensor]:
        terms = self.loss.terms(outputs.detach(), batch)
        weighted = terms.weights.sqrt() * terms.gradients
        return _one_term_at_a_time(weighted[None], terms.dims, samples)


@dataclass(frozen=True)
class SampledGradients:
    """``∇²L = E[v vᵀ]``: gradients for targets drawn from the model, those of FisherOperator.

    Terms of a sample need not be kept apart: they are drawn independently, and with mean zero.
    """

    sampled: MonteCarlo

    def __call__(self, outputs: Tensor, batch: Batch, b: int, samples: int) -> Iterator[Tensor]:
        for terms in self.sampled.draws(outputs.detach(), batch, b):
            yield ((terms.weights / self.sampled.samples).sqrt() * terms.gradients)[None]


def sampled_gradients(
    loss: LossOfOutput, draws: int, seed: int, starts: tuple[int, ...]
) -> SampledGradients:
    """With ``draws`` targets for every term; ``starts`` number the first samples of batches.

    Raises:
        OptionError: the loss is the negative log-likelihood of no distribution known here.
    """
    loss.refuse_unless_likelihood()
    return SampledGradients(MonteCarlo(loss, draws, seed, starts))


@dataclass(frozen=True)
class NoVectors:
    """For "forward-only", where the factor of the gradients is the identity."""

    def __call__(self, outputs: Tensor, batch: Batch, b: int, samples: int) -> Iterator[Tensor]:
        return iter(())


def _one_term_at_a_time(S: Tensor, dims: tuple[int, ...], samples: int) -> Iterator[Tensor]:
    """The vectors (C, *outputs.shape) cut to one loss term of every sample, for each in turn.

    A term extends along ``dims`` of the outputs, of which each sample has equally many rows.
    """
    rows, axes = S.shape[1] // samples, range(2 - S.ndim, 0)
    others = [1 if axis in dims else S.shape[axis] for axis in axes]
    number = torch.arange(rows * torch.Size(others).numel(), device=S.device)
    number = number.view(rows, *others).repeat(samples, *[1] * len(others))
    for term in range(rows * torch.Size(others).numel()):
        V = S * (number == term)
        if V.any():  # not all masked
            yield V
