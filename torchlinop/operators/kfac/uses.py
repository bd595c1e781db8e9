"""Where a parameter acts: its gradient for every sample, from inputs and gradients of a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from torchlinop.operators.kfac.features import Dense, Features
from torchlinop.operators.kfac.layers import KroneckerLayer, Layer, ScaleLayer
from torchlinop.operators.kfac.tape import Tape

Gradients = Mapping[str, Tensor]  # (k, N, S, d_out) at the outputs of layers, by their names
Uses = Mapping[str, Sequence[tuple[Layer, str]]]  # of a slot: layers, and "weight" or "bias"
Basis = Tensor | None  # eigenvectors as columns, or the unit vectors

_ENTRIES_AT_ONCE = 2**24  # of gradients of single samples


class Use(ABC):
    """A matrix of parameters (r, c) in one layer."""

    layer: Layer

    @abstractmethod
    def of_samples(
        self, tape: Tape, gradients: Gradients, rotation: tuple[Basis, Basis] = (None, None)
    ) -> Callable[[slice], Tensor]:
        """A function that gives ``Q_Lᵀ G Q_R`` for the gradients G (k, n, r, c) of n samples."""

    def squared(
        self, tape: Tape, gradients: Gradients, rotation: tuple[Basis, Basis]
    ) -> Tensor | None:
        """``Σ_vn (Q_Lᵀ G_vn Q_R)²``: (r, c), if that is had for less than from every G_vn."""
        return None

    @abstractmethod
    def bound(self, tape: Tape, gradients: Gradients) -> Tensor:
        """More than the gradient of all samples can be large."""


@dataclass(frozen=True)
class KroneckerUse(Use):
    """``G_n = Σ_s g_ns a_nsᵀ``, or its transpose where the weight is (d_in, d_out)."""

    layer: KroneckerLayer
    part: Callable[[Features], Features]  # what of a the parameters multiply

    def features(self, tape: Tape) -> Features:
        return self.part(tape.features(self.layer))

    def of_samples(
        self, tape: Tape, gradients: Gradients, rotation: tuple[Basis, Basis] = (None, None)
    ) -> Callable[[slice], Tensor]:
        features, g = self.features(tape), gradients[self.layer.name]
        first = self.layer.inputs_first
        Q_out, Q_in = rotation[::-1] if first else rotation

        def of(samples: slice) -> Tensor:
            G = features.of_samples(samples).rotated_pair(g[:, samples], Q_out, Q_in)
            return G.mT if first else G

        return of

    def squared(
        self, tape: Tape, gradients: Gradients, rotation: tuple[Basis, Basis]
    ) -> Tensor | None:
        first = self.layer.inputs_first
        Q_out, Q_in = rotation[::-1] if first else rotation
        M = self.features(tape).squared_pair(gradients[self.layer.name], Q_out, Q_in)
        return M.mT if first and M is not None else M

    def bound(self, tape: Tape, gradients: Gradients) -> Tensor:
        g: Tensor = torch.linalg.vector_norm(gradients[self.layer.name])
        return self.features(tape).norm * g


@dataclass(frozen=True)
class ScaleUse(Use):
    """``G_n = Σ_s x̂_ns ∘ g_ns`` for the weight of a normalisation: (d, 1)."""

    layer: ScaleLayer

    def of_samples(
        self, tape: Tape, gradients: Gradients, rotation: tuple[Basis, Basis] = (None, None)
    ) -> Callable[[slice], Tensor]:
        a, g = self._inputs(tape), gradients[self.layer.name]
        return lambda samples: (a[samples] * g[:, samples]).sum(2)[..., None]

    def bound(self, tape: Tape, gradients: Gradients) -> Tensor:
        a: Tensor = torch.linalg.vector_norm(self._inputs(tape))
        g: Tensor = torch.linalg.vector_norm(gradients[self.layer.name])
        return a * g

    def _inputs(self, tape: Tape) -> Tensor:
        return tape.normalised(self.layer)


class ShiftUse(ScaleUse):
    """``G_n = Σ_s g_ns`` for its bias."""

    def _inputs(self, tape: Tape) -> Tensor:
        return torch.ones_like(tape.normalised(self.layer))


def _all(features: Features) -> Features:
    return features


def _ones(features: Features) -> Features:
    return cast(Dense, features).ones()


def _with_one(features: Features) -> Features:
    return cast(Dense, features).with_one()


def use_of(layer: Layer, key: str) -> Use:
    """The use of the parameter ``key``, "weight" or "bias", of a layer."""
    if isinstance(layer, ScaleLayer):
        return ScaleUse(layer) if key == "weight" else ShiftUse(layer)
    return KroneckerUse(cast(KroneckerLayer, layer), _all if key == "weight" else _ones)


def joint_use(layer: KroneckerLayer) -> KroneckerUse:
    """Weight and bias as one matrix: ``[W, b]``, or ``[W; b]`` where the weight is transposed."""
    return KroneckerUse(layer, _with_one)


def squared_over_uses(
    tape: Tape,
    gradients: Gradients,
    uses: Sequence[Use],
    entries: int,
    rotation: tuple[Basis, Basis],
) -> Tensor | None:
    """``Σ_vn (Q_Lᵀ G_vn Q_R)²`` with G_vn from all uses together; None if no layer was called."""
    called = [use for use in uses if use.layer.name in gradients]
    M = called[0].squared(tape, gradients, rotation) if len(called) == 1 else None
    if M is not None or not called:
        return M
    parts = summed_over_uses(tape, gradients, called, entries, rotation)
    return torch.stack([G.square().sum((0, 1)) for G in parts]).sum(0)


def summed_over_uses(
    tape: Tape,
    gradients: Gradients,
    uses: Sequence[Use],
    entries: int,
    rotation: tuple[Basis, Basis] = (None, None),
) -> Iterator[Tensor]:
    """The gradients (k, n, r, c) of n samples after another: of all uses together."""
    called = [use for use in uses if use.layer.name in gradients]
    functions = [use.of_samples(tape, gradients, rotation) for use in called]
    if functions:
        k = len(gradients[called[0].layer.name])
        size = max(1, _ENTRIES_AT_ONCE // (k * entries))
        for start in range(0, tape.samples, size):
            yield torch.stack([of(slice(start, start + size)) for of in functions]).sum(0)


def layers_of(uses: Uses) -> tuple[Layer, ...]:
    """Each once."""
    return tuple({layer.name: layer for u in uses.values() for layer, _ in u}.values())
