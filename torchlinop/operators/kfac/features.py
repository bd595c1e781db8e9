"""a_ns: what a layer multiplies its weight with, for sample n and position s (K-FAC's inputs)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor


@dataclass(frozen=True)
class Features(ABC):
    """Inputs a_ns of a layer, in N samples with S positions each."""

    counted: Tensor  # (N, S), 1 for positions that count in A, 0 for padding

    @abstractmethod
    def moment(self) -> Tensor:
        """``Σ_ns a_ns a_nsᵀ`` over positions that count: (d_in, d_in), or (d_in,) if diagonal."""

    @property
    @abstractmethod
    def norm(self) -> Tensor:
        """The root of the sum of all squares."""

    @abstractmethod
    def reduced(self) -> Features:
        """The mean over the positions of every sample, as one position."""

    @abstractmethod
    def pair(self, g: Tensor) -> Tensor:
        """``Σ_s g_ns a_nsᵀ`` for gradients (k, N, S, d_out): (k, N, d_out, d_in)."""

    @abstractmethod
    def rotated_pair(self, g: Tensor, Q_out: Tensor | None, Q_in: Tensor | None) -> Tensor:
        """``Q_outᵀ (Σ_s g_ns a_nsᵀ) Q_in``, where None is the identity."""

    def squared_pair(self, g: Tensor, Q_out: Tensor | None, Q_in: Tensor | None) -> Tensor | None:
        """``Σ_kn (Q_outᵀ g_kn a_nᵀ Q_in)²``: (d_out, d_in), for one position a sample, or None.

        No matrix of a single sample is formed: squares of products are products of squares.
        """
        return None

    @abstractmethod
    def of_samples(self, samples: slice) -> Features:
        """Those of some samples."""

    @abstractmethod
    def followed_by(self, other: Features) -> Features:
        """The positions of two calls of the layer, side by side."""


@dataclass(frozen=True)
class Dense(Features):
    """Vectors; a convolution in groups multiplies each group of outputs with its own."""

    a: Tensor  # (N, S, groups, d_in)

    def moment(self) -> Tensor:
        """The mean over groups."""
        rows = self.a.flatten(0, 2)
        weights = self.counted[..., None].expand(self.a.shape[:3]).reshape(-1, 1)
        return (weights * rows).mT @ rows / self.a.shape[2]

    @property
    def norm(self) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(self.a)
        return norm

    def reduced(self) -> Dense:
        number = self.counted.sum(1, keepdim=True)
        weights = self.counted / number.clamp_min(1)
        a = torch.einsum("ns,nsgi->ngi", weights, self.a)[:, None]
        return Dense((number > 0).to(self.a), a)

    def pair(self, g: Tensor) -> Tensor:
        groups = self.a.shape[2]
        return torch.einsum("knsgo,nsgi->kngoi", g.unflatten(3, (groups, -1)), self.a).flatten(2, 3)

    def rotated_pair(self, g: Tensor, Q_out: Tensor | None, Q_in: Tensor | None) -> Tensor:
        if self.a.shape[2] > 1:  # Q_out mixes groups, whose inputs differ
            return rotated(self.pair(g), Q_out, Q_in)
        # Rotating vectors is cheaper than rotating the matrices they make.
        g = g if Q_out is None else g @ Q_out
        a = self.a if Q_in is None else self.a @ Q_in
        return Dense(self.counted, a).pair(g)

    def squared_pair(self, g: Tensor, Q_out: Tensor | None, Q_in: Tensor | None) -> Tensor | None:
        if self.a.shape[1:3] != (1, 1):
            return None
        g = g if Q_out is None else g @ Q_out
        a = self.a if Q_in is None else self.a @ Q_in
        return g.square().sum(0)[:, 0].mT @ a.square()[:, 0, 0]

    def of_samples(self, samples: slice) -> Dense:
        return Dense(self.counted[samples], self.a[samples])

    def followed_by(self, other: Features) -> Dense:
        other = cast(Dense, other)
        return Dense(torch.cat([self.counted, other.counted], 1), torch.cat([self.a, other.a], 1))

    def with_one(self) -> Dense:
        """``[a, 1]``: what weight and bias are multiplied with together."""
        return Dense(self.counted, torch.cat([self.a, torch.ones_like(self.a[..., :1])], 3))

    def ones(self) -> Dense:
        """``[1]``: what the bias is multiplied with."""
        return Dense(self.counted, torch.ones_like(self.a[..., :1]))


@dataclass(frozen=True)
class OneHot(Features):
    """Unit vectors of ``size`` entries, by their number; they stay one position each.

    The mean over positions would no longer be a unit vector, nor A diagonal.
    """

    ids: Tensor  # (N, S)
    size: int

    def moment(self) -> Tensor:
        weights = self.counted.flatten()
        return weights.new_zeros(self.size).index_add_(0, self.ids.flatten(), weights)

    @property
    def norm(self) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(self.counted)
        return norm

    def reduced(self) -> OneHot:
        return self

    def pair(self, g: Tensor) -> Tensor:
        k, N, _, d_out = g.shape
        rows = self.ids + self.size * torch.arange(N, device=self.ids.device)[:, None]
        sums = g.new_zeros(k, N * self.size, d_out).index_add_(1, rows.flatten(), g.flatten(1, 2))
        return sums.view(k, N, self.size, d_out).mT

    def rotated_pair(self, g: Tensor, Q_out: Tensor | None, Q_in: Tensor | None) -> Tensor:
        if Q_in is None:
            return self.pair(g if Q_out is None else g @ Q_out)
        return Dense(self.counted, Q_in[self.ids][:, :, None]).rotated_pair(g, Q_out, None)

    def of_samples(self, samples: slice) -> OneHot:
        return OneHot(self.counted[samples], self.ids[samples], self.size)

    def followed_by(self, other: Features) -> OneHot:
        other = cast(OneHot, other)
        counted = torch.cat([self.counted, other.counted], 1)
        return OneHot(counted, torch.cat([self.ids, other.ids], 1), self.size)


def rotated(G: Tensor, Q_out: Tensor | None, Q_in: Tensor | None) -> Tensor:
    """``Q_outᵀ G Q_in``, where None is the identity."""
    G = G if Q_out is None else Q_out.mT @ G
    return G if Q_in is None else G @ Q_in
