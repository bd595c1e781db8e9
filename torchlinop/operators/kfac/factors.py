"""A = mean of a aᵀ and B = Σ g gᵀ for every matrix of parameters, batch by batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import ChainMap
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from torchlinop.errors import NonFiniteError
from torchlinop.from_model import OutputObjective
from torchlinop.operators.eigenbasis import (
    Eigenbasis,
    averaged_over_eigenspaces,
    common_eigenbasis,
)
from torchlinop.operators.kfac.layers import KroneckerLayer, Layer
from torchlinop.operators.kfac.tape import Tape, numbered, recorded
from torchlinop.operators.kfac.uses import (
    Gradients,
    KroneckerUse,
    Use,
    squared_over_uses,
    summed_over_uses,
)
from torchlinop.operators.kfac.vectors import Vectors
from torchlinop.operators.kronecker import (
    KroneckerBlock,
    common_bases,
    diagonal_block,
    kronecker_sum,
)
from torchlinop.ranks import Ranks

Entries = slice | Tensor


@dataclass(kw_only=True)
class Observer:
    """Sums over batches, in float64, of what each gives in the dtype of the parameters."""

    totals: dict[str, Tensor] = field(default_factory=dict)  # by what they are of

    def add(self, of: str, term: Tensor, share: float = 1.0) -> None:
        """``total += share · term``."""
        term = share * term.double()
        self.totals[of] = self.totals[of].add_(term) if of in self.totals else term

    def see_inputs(self, tape: Tape) -> None:
        """Once for every batch."""

    def see_gradients(self, tape: Tape, V: Tensor, gradients: Gradients, share: float) -> None:
        """For every chunk of vectors (k, *outputs.shape) that was backpropagated."""


@dataclass(kw_only=True)
class Part(Observer, ABC):
    """A block in the making."""

    @abstractmethod
    def block(self, dtype: torch.dtype) -> KroneckerBlock:
        """What all batches together give."""

    def corrected(self, dtype: torch.dtype) -> Part:
        """EKFAC's part, which sees all batches again; this one, finished, where it is exact."""
        return Constant(self.block(dtype))


@dataclass
class Constant(Part):
    """A block that is known."""

    finished: KroneckerBlock

    def block(self, dtype: torch.dtype) -> KroneckerBlock:
        return self.finished


@dataclass
class GradientMoment(Observer):
    """``B = Σ_v Σ_ns g gᵀ`` of a layer, for its weight and its bias.

    Without gradients, B is the identity.
    """

    layer: KroneckerLayer
    reduced: bool
    with_gradients: bool

    def see_gradients(self, tape: Tape, V: Tensor, gradients: Gradients, share: float) -> None:
        if self.layer.name in gradients:
            g = gradients[self.layer.name]
            g = g.sum(2, keepdim=True) if self.reduced and self.layer.reducible else g
            rows = g.flatten(0, 2)
            self.add("B", rows.mT @ rows, share)

    def of_size(self, d_out: int, like: Tensor) -> Tensor:
        """B: (d_out, d_out), or its diagonal (d_out,)."""
        unseen = like.new_zeros if self.with_gradients else like.new_ones
        return self.totals["B"] if "B" in self.totals else unseen(d_out)

    @cached_property
    def basis(self) -> Eigenbasis | None:
        return common_eigenbasis([self.totals["B"]]) if "B" in self.totals else None


@dataclass
class KroneckerPart(Part):
    """``Σ_uses B ⊗ A`` for a matrix of parameters (r, c).

    A is a mean over positions (of all calls, groups and batches), B a sum over them; where
    positions are ``reduced``, A is a mean over samples of averaged a, B a sum over samples of
    summed g.
    """

    entries: Entries
    shape: tuple[int, int]
    uses: Sequence[KroneckerUse]
    reduced: bool
    gradients: Mapping[str, GradientMoment]  # by the name of the layer

    def see_inputs(self, tape: Tape) -> None:
        for use in self.uses:
            if use.layer.name in tape.calls:
                features = use.features(tape)
                features = features.reduced() if self.reduced else features
                self.add(f"a aᵀ {use.layer.name}", features.moment())
                self.add(f"number {use.layer.name}", features.counted.sum())

    def block(self, dtype: torch.dtype) -> KroneckerBlock:
        return self._eigendecomposition(dtype)[0]

    def corrected(self, dtype: torch.dtype) -> Part:
        return CorrectedPart(self.uses, *self._eigendecomposition(dtype))

    def _eigendecomposition(
        self, dtype: torch.dtype
    ) -> tuple[KroneckerBlock, tuple[Eigenbasis, Eigenbasis]]:
        called = [use for use in self.uses if f"a aᵀ {use.layer.name}" in self.totals]
        pairs = [self._pair(use) for use in called]
        bases = self._bases(called[0]) if len(called) == 1 else common_bases(pairs)
        return kronecker_sum(self.entries, pairs, bases, dtype), bases

    def _pair(self, use: KroneckerUse) -> tuple[Tensor, Tensor]:
        """The left and the right factor: B and A, or A and B where the weight is (d_in, d_out)."""
        number = self.totals[f"number {use.layer.name}"].clamp_min(1)
        A = self.totals[f"a aᵀ {use.layer.name}"] / number
        first = use.layer.inputs_first
        B = self.gradients[use.layer.name].of_size(self.shape[1 if first else 0], A)
        return (A, B) if first else (B, A)

    def _bases(self, use: KroneckerUse) -> tuple[Eigenbasis, Eigenbasis]:
        """For one product; that of B serves the weight and the bias."""
        left, right = self._pair(use)
        of_B = self.gradients[use.layer.name].basis
        if of_B is None:
            return common_bases([(left, right)])
        if use.layer.inputs_first:
            return common_eigenbasis([left]), of_B
        return of_B, common_eigenbasis([right])


@dataclass
class CorrectedPart(Part):
    """``λ = Σ_v Σ_n (Q_Lᵀ G_vn Q_R)²``, second moments of the gradients in K-FAC's eigenbasis.

    G_vn is the gradient of the whole sample, from all its positions and all uses of the matrix.
    """

    uses: Sequence[KroneckerUse]
    uncorrected: KroneckerBlock
    bases: tuple[Eigenbasis, Eigenbasis]

    def see_gradients(self, tape: Tape, V: Tensor, gradients: Gradients, share: float) -> None:
        rotation = (self.uncorrected.left, self.uncorrected.right)
        entries = self.uncorrected.eigenvalues.numel()
        M = squared_over_uses(tape, gradients, self.uses, entries, rotation)
        if M is not None:
            self.add("λ", M, share)

    def block(self, dtype: torch.dtype) -> KroneckerBlock:
        unseen = torch.zeros_like(self.uncorrected.eigenvalues, dtype=torch.float64)
        moments = self.totals.get("λ", unseen)
        roundoff = torch.finfo(dtype).eps
        for dim, basis in enumerate(self.bases):
            moments = averaged_over_eigenspaces(moments, basis, dim, roundoff)
        return self.uncorrected.with_eigenvalues(moments.to(dtype))


@dataclass
class DensePart(Part):
    """``Σ_v Σ_n γ_vn γ_vnᵀ``, exact, for few parameters: γ joins the gradients of some tensors."""

    entries: Tensor
    uses: Sequence[list[Use]]  # for every tensor
    sizes: Sequence[int]

    def see_gradients(self, tape: Tape, V: Tensor, gradients: Gradients, share: float) -> None:
        parts = [
            torch.cat(list(summed_over_uses(tape, gradients, uses, size)), 1).flatten(2)
            for uses, size in zip(self.uses, self.sizes, strict=True)
            if any(use.layer.name in gradients for use in uses)
        ]
        if parts:
            rows = torch.cat(parts, 2).flatten(0, 1)
            self.add("γ γᵀ", rows.mT @ rows, share)

    def block(self, dtype: torch.dtype) -> KroneckerBlock:
        size = sum(self.sizes)
        zeros = torch.zeros(size, dtype=torch.float64, device=self.entries.device)
        C = self.totals.get("γ γᵀ", zeros)
        pairs = [(C, C.new_ones(1))]
        return kronecker_sum(self.entries, pairs, common_bases(pairs), dtype)


@dataclass
class DiagonalPart(Part):
    """``Σ_v Σ_n (J_nᵀ v)²``, the exact diagonal, one backward pass for every v and n."""

    entries: Tensor

    def see_gradients(self, tape: Tape, V: Tensor, gradients: Gradients, share: float) -> None:
        sample_of = torch.arange(V.shape[1], device=V.device) // (V.shape[1] // tape.samples)
        for v in V:
            for n in range(tape.samples):
                v_n = v * (sample_of == n).view(-1, *[1] * (v.ndim - 1))
                if v_n.any():
                    G = tape.parameter_gradient(v_n)[self.entries]
                    self.add("γ²", G.square(), share)

    def block(self, dtype: torch.dtype) -> KroneckerBlock:
        zeros = torch.zeros(len(self.entries), device=self.entries.device)
        return diagonal_block(self.entries, self.totals.get("γ²", zeros).to(dtype))


def collect(
    objective: OutputObjective,
    layers: Sequence[Layer],
    observers: Sequence[Observer],
    vectors: Vectors,
) -> None:
    """Show all data to the observers: of samples without a loss term, their inputs.

    Costs a forward pass, and a backward pass for every vector; where several processes have the
    data between them, an all-reduce for every sum.

    Raises:
        KFACCoverageError: the input of a layer does not begin with the samples.
        NonFiniteError: derivatives of the loss are NaN or infinite.
    """
    with objective.ranks.agreed():
        _collect_here(objective, layers, observers, vectors)
    _sum_over_ranks(objective.ranks, observers, objective.theta)


def _collect_here(
    objective: OutputObjective,
    layers: Sequence[Layer],
    observers: Sequence[Observer],
    vectors: Vectors,
) -> None:
    with closing(numbered(objective)) as batches:  # type: ignore[type-var]  # a generator
        for b, batch, share in batches:
            with recorded(objective, b, batch, layers) as tape:
                tape.refuse_other_axes()
                for observer in observers:
                    observer.see_inputs(tape)
                for V in vectors(tape, batch, objective.data.starts[b]):
                    _refuse_nonfinite(V, b)
                    gradients = tape.gradients(V)
                    for observer in observers:
                        observer.see_gradients(tape, V, gradients, share)
    with closing(objective.data.silent()) as silent:  # type: ignore[type-var]  # a generator
        for b, batch in enumerate(silent, start=objective.data.own.batches):
            with recorded(objective, b, batch, layers) as tape:
                tape.refuse_other_axes()
                for observer in observers:
                    observer.see_inputs(tape)


def _refuse_nonfinite(V: Tensor, b: int) -> None:
    if not torch.isfinite(V).all():
        raise NonFiniteError(
            f"derivatives of the loss on batch {b} hold NaN or infinity; clean its targets"
        )


def _sum_over_ranks(ranks: Ranks, observers: Sequence[Observer], like: Tensor) -> None:
    """Every sum over the data of all processes, some of which may have seen nothing for it."""
    mine = [{of: t.shape for of, t in observer.totals.items()} for observer in observers]
    of_ranks = ranks.gathered(mine)
    for observer, *shapes in zip(observers, *of_ranks, strict=True):
        for of, shape in sorted(dict(ChainMap(*shapes)).items()):
            zeros = like.new_zeros(shape, dtype=torch.float64)
            observer.totals[of] = ranks.sum(partial(observer.totals.get, of, zeros), zeros)
