"""diag(d), and d of the GGN: Σ_n Σ_c (J_nᵀ s_nc)² with ω_n ∇²ℓ_n = Σ_c s_nc s_ncᵀ."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from torchlinop.batches import Batch, split
from torchlinop.columns import ColumnChunks
from torchlinop.derivatives import ForwardOverReverse
from torchlinop.errors import OptionError, VectorError
from torchlinop.from_model import ObjectiveOptions, OutputObjective, output_objective
from torchlinop.losses.base import LossOfOutput
from torchlinop.losses.of_model import ForwardFn
from torchlinop.operators.base import CurvatureOperator
from torchlinop.operators.damping import finite_number, inverted
from torchlinop.parameters import ParameterLayout
from torchlinop.per_sample import refuse_mixed_samples, refuse_mixing_loss
from torchlinop.space import VectorSpace
from torchlinop.weighting import Weighting, sample_weights

_COLUMNS = 16  # vector-Jacobian products that go through one pass at most


class DiagonalOperator(CurvatureOperator):
    """The diagonal matrix with these entries, a real tensor (n,), which is copied.

    A product costs n multiplications, whatever was paid for the entries.
    """

    def __init__(
        self,
        diagonal: Tensor,
        *,
        layout: ParameterLayout | None = None,
        description: Sequence[str] = (),
    ) -> None:
        if diagonal.ndim != 1 or not diagonal.is_floating_point():
            raise VectorError(
                f"expected a diagonal of real floating-point entries (n,), got {diagonal.dtype} "
                f"of shape {tuple(diagonal.shape)}; pass matrix.diagonal(), say"
            )
        space = VectorSpace(len(diagonal), diagonal.dtype, diagonal.device)
        super().__init__(space, layout=layout, description=description)
        self.diagonal = diagonal.detach().clone()

    def _matmat(self, V: Tensor) -> Tensor:
        return self.diagonal[:, None] * V

    def inverse(self, damping: float) -> DiagonalOperator:
        """``(D + damping I)⁻¹``.

        Raises:
            OptionError: damping is no number, or the inverse is not finite in the dtype of D, as
                an entry is (close to) −damping.
        """
        damping = finite_number("damping", damping)
        return DiagonalOperator(
            inverted(self.diagonal.double() + damping, damping, self.dtype),
            layout=self.layout,
            description=[f"inverse of {type(self).__name__} + {damping:g} I", *self.description],
        )

    def trace(self) -> Tensor:
        """The sum of the entries, a float64 scalar."""
        return self.diagonal.sum(dtype=torch.float64)

    def logdet(self) -> Tensor:
        """The logarithm of the determinant, a float64 scalar: −∞ if it is zero, NaN if negative."""
        d = self.diagonal.double()
        return d.abs().log().sum() + d.sign().prod().log()


def ggn_diagonal(
    model: nn.Module,
    dataloader: Iterable[Batch],
    forward_fn: ForwardFn,
    loss_of_output_fn: Any,
    **options: Unpack[ObjectiveOptions],
) -> DiagonalOperator:
    """The exact diagonal of ``GGNOperator(model, dataloader, forward_fn, loss_of_output_fn)``.

    Every loss term n of a sample (a token, say) gives the columns s_nc of a square root of its
    Hessian with respect to the outputs, c = 1 ... C: as many as classes, or outputs. Columns that
    are zero, as those of masked tokens, are left out. Samples go through the model one at a time:
    not with random numbers that those of one batch share, as a dropout mask in train mode.

    Costs, per sample, one forward pass and C vector-Jacobian products a term. Memory: the
    activations of one sample, C times its outputs, and 16 vectors.

    Raises:
        SampleMixingError, WeightingError: the model, or the loss, lets samples depend on
            each other.
        BatchError: a batch cannot be split into samples.
        OptionError: the loss is not convex in the outputs, or the model draws random numbers.
        TorchlinopError: as ``GGNOperator``.

    Source: Dangel, Kunstner and Hennig, BackPACK: packing more into backprop, ICLR 2020.
    """
    objective = output_objective(
        model, dataloader, forward_fn, loss_of_output_fn, of_samples=True, **options
    )
    loss, outputs_of = objective.function.loss, objective.function.outputs
    weighting = loss.weighting or objective.data.weighting
    refuse_mixed_samples(objective, outputs_of)
    _refuse_random_numbers(objective)
    refuse_mixing_loss(objective)
    chunks = ColumnChunks(limit=_COLUMNS)

    def of_batch(b: int, batch: Batch) -> Tensor:
        total = torch.zeros_like(objective.theta)
        for sample, share in _samples(batch, weighting):
            with objective.evaluating(b, sample, outputs_of) as f:
                local = ForwardOverReverse().linearize(f, objective.theta)
                for U in _columns(loss, local.outputs, sample):
                    squares = chunks.apply(local.pull, U, last=False).square().sum(1)
                    total.add_(squares, alpha=share)
        return total

    return DiagonalOperator(
        objective.mean(of_batch, objective.theta),
        layout=objective.layout,
        description=["diagonal of the GGN", *objective.description],
    )


def _refuse_random_numbers(objective: OutputObjective) -> None:
    """A sample alone would draw other numbers than in its batch. Costs a forward pass."""
    devices = [device for device in [objective.space.device] if device.type == "cuda"]

    def random_state() -> Tensor:
        return torch.cat([torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)])

    def draws(model: nn.Module, batch: Batch) -> Tensor:
        before = random_state()
        objective.function.outputs(model, batch)
        return (random_state() != before).any()

    batch = next(iter(objective.data))[0]
    with objective.evaluating(0, batch, draws) as drawn, torch.no_grad():
        if drawn(objective.theta):
            raise OptionError(
                "the model draws random numbers, as Dropout does in train mode, one set for every "
                "batch, but the diagonal is taken sample by sample; "
                'pass mode="eval", or take the noise out of the model'
            )


def _samples(batch: Batch, weighting: Weighting) -> Iterator[tuple[Batch, float]]:
    """The samples that count, each with its share of the loss of the batch."""
    weights = sample_weights(weighting, batch).tolist()
    yield from ((s, w) for s, w in zip(split(batch, 1), weights, strict=True) if w)


def _columns(loss: LossOfOutput, outputs: Tensor, batch: Batch) -> Iterator[Tensor]:
    """The s_nc that are not zero, in blocks of columns (m, k) for the m entries of the outputs."""
    S = loss.root(outputs, batch).flatten(1)  # (C, m)
    terms = _term_of_entry(outputs, loss.terms(outputs, batch).dims)
    sizes = S.new_zeros(len(S), int(terms.max()) + 1).index_add_(1, terms, S.abs())
    pairs = sizes.nonzero()  # of c and n
    for start in range(0, len(pairs), _COLUMNS):
        c, n = pairs[start : start + _COLUMNS].unbind(1)
        yield (S[c] * (terms == n[:, None])).mT


def _term_of_entry(outputs: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The number of the loss term that reads each of the m entries of the outputs: (m,)."""
    shape = [1 if axis in dims else outputs.shape[axis] for axis in range(-outputs.ndim, 0)]
    numbers = torch.arange(math.prod(shape), device=outputs.device).view(shape)
    return numbers.expand(outputs.shape).flatten()
