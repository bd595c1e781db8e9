"""Σ_v v vᵀ = M: the vectors of outputs that K-FAC backpropagates, whatever its Fisher type."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from torchlinop.batches import Batch
from torchlinop.losses.base import LossOfOutput, Terms
from torchlinop.operators.fisher import MonteCarlo
from torchlinop.operators.kfac.tape import Tape

FisherType = Literal["type-2", "mc", "empirical", "forward-only"]

# (what went through the model, the batch, the number of its first sample among all) -> vectors
# (k, *outputs.shape), some at a time, each of which holds one loss term of every sample.
Vectors = Callable[[Tape, Batch, int], Iterator[Tensor]]

# Several terms of a sample in one vector would bring products of different terms into the squares
# (Jᵀ v)(Jᵀ v)ᵀ.


@dataclass(frozen=True)
class HessianRoot:
    """``∇²L = Σ_v v vᵀ``: C vectors for every term of a sample.

    Memory: C vectors of the size of the outputs, C² numbers for every loss term of a batch.
    """

    loss: LossOfOutput

    def __call__(self, tape: Tape, batch: Batch, start: int) -> Iterator[Tensor]:
        outputs = tape.outputs.detach()
        dims = self.loss.terms(outputs, batch).dims
        return _one_term_at_a_time(self.loss.root(outputs, batch), dims, tape)


@dataclass(frozen=True)
class TermGradients:
    """``Σ_n ω_n g_n g_nᵀ = Σ_v v vᵀ`` with the gradients g_n of the loss terms."""

    loss: LossOfOutput

    def __call__(self, tape: Tape, batch: Batch, start: int) -> Iterator[Tensor]:
        return _of_terms(self.loss.terms(tape.outputs.detach(), batch), tape)


@dataclass(frozen=True)
class SampledGradients:
    """``∇²L = E[v vᵀ]``: gradients for targets drawn from the model, those of FisherOperator."""

    sampled: MonteCarlo

    def __call__(self, tape: Tape, batch: Batch, start: int) -> Iterator[Tensor]:
        for terms in self.sampled.draws(tape.outputs.detach(), batch, start):
            yield from _of_terms(replace(terms, weights=terms.weights / self.sampled.samples), tape)


def sampled_gradients(loss: LossOfOutput, draws: int, seed: int) -> SampledGradients:
    """With ``draws`` targets for every term.

    Raises:
        OptionError: the loss is the negative log-likelihood of no distribution known here.
    """
    loss.refuse_unless_likelihood()
    return SampledGradients(MonteCarlo(loss, draws, seed))


@dataclass(frozen=True)
class NoVectors:
    """For "forward-only", where the factor of the gradients is the identity."""

    def __call__(self, tape: Tape, batch: Batch, start: int) -> Iterator[Tensor]:
        return iter(())


def _of_terms(terms: Terms, tape: Tape) -> Iterator[Tensor]:
    weighted = terms.weights.sqrt() * terms.gradients
    return _one_term_at_a_time(weighted[None], terms.dims, tape)


def _one_term_at_a_time(S: Tensor, dims: tuple[int, ...], tape: Tape) -> Iterator[Tensor]:
    """The vectors (C, *outputs.shape) cut to one loss term of every sample, for each in turn.

    A term extends along ``dims`` of the outputs, of which each sample has equally many rows. As
    many vectors at once as one backward pass takes.
    """
    rows, axes = S.shape[1] // tape.samples, range(2 - S.ndim, 0)
    shape = [rows, *(1 if axis in dims else S.shape[axis] for axis in axes)]
    numbers = torch.arange(torch.Size(shape).numel(), device=S.device)
    number = numbers.view(shape).repeat(tape.samples, *[1] * len(axes))
    at_once = tape.vectors_at_once()
    for columns in S.split(at_once):
        for some in numbers.split(max(1, at_once // len(columns))):
            chosen = number == some.view(-1, *[1] * number.ndim)
            V = (chosen[:, None] * columns).flatten(0, 1)
            V = V[V.flatten(1).any(1)]  # not those that are masked
            if len(V):
                yield V
