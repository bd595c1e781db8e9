"""Layers that K-FAC knows: how their inputs become a (N, S, d_in), and gradients g (N, S, d_out).

S counts the positions of a sample at which the layer is applied: tokens, or places of an image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from torchlinop.errors import KFACCoverageError
from torchlinop.operators.kfac.features import Dense, Features, OneHot
from torchlinop.operators.kfac.patches import patches


@dataclass(frozen=True)
class Layer(ABC):
    """A module of the model, by its name, and where its parameters enter."""

    name: str
    module: nn.Module
    shared: bool = False  # whether one input without a sample axis serves all samples

    @property
    @abstractmethod
    def kind(self) -> str:
        """For people."""

    def input_at_all_samples(self, x: Tensor, samples: int) -> Tensor:
        """The input that serves all samples, with a sample axis of full length.

        Positions, which are the same for all, are often looked up once. So every sample gets a
        gradient of its own.
        """
        one_row = x.shape[:1] == (1,) and x.ndim > 1
        return x.expand(samples, *(x.shape[1:] if one_row else x.shape))

    @property
    def least_axes(self) -> int:
        """Of an input with samples."""
        return 2

    def begins_with_samples(self, x: Tensor, samples: int) -> bool:
        """Whether the first axis of the input can be the samples, or samples and positions."""
        return x.ndim >= self.least_axes and len(x) % samples == 0

    def refuse_other_axes(self, x: Tensor, samples: int) -> None:
        """Raise KFACCoverageError unless the input begins with the samples."""
        if not self.begins_with_samples(x, samples):
            raise KFACCoverageError(
                f"expected the input of {self.name or 'the model itself'} to begin with an axis of "
                f"{samples} samples, got shape {tuple(x.shape)}; put the samples first in the "
                "model, or leave its parameters out with param_filter"
            )

    @abstractmethod
    def by_position(self, g: Tensor, samples: int) -> Tensor:
        """What has the shape of the output, (k, R, ...): (k, N, S, d_out)."""

    @abstractmethod
    def fits(self, x: Tensor, y: Tensor, samples: int) -> bool:
        """Whether an input, an output and the weight have shapes that belong together.

        Subclasses may compute something else than their class says. Where shapes do not even
        allow the computation, torch's RuntimeError passes through.
        """


@dataclass(frozen=True)
class KroneckerLayer(Layer):
    """A layer whose weight multiplies features: its gradient is ``Σ_s g_s a_sᵀ``."""

    @property
    def inputs_first(self) -> bool:
        """Whether the weight is (d_in, d_out), the transposed of (d_out, d_in)."""
        return False

    @property
    def reducible(self) -> bool:
        """Whether positions are averaged for approximation="reduce"."""
        return True

    @abstractmethod
    def features(self, x: Tensor, samples: int, counted: Tensor | None) -> Features:
        """The a of an input x; ``counted`` (N, T) says which of T tokens are no padding."""

    def without_padding(self, g: Tensor, x: Tensor, samples: int) -> Tensor:
        """Gradients (k, N, S, d_out) as far as they reach the weight."""
        return g

    def fits(self, x: Tensor, y: Tensor, samples: int) -> bool:
        g = self.without_padding(self.by_position(y[None], samples), x, samples)
        G = self.features(x, samples, None).pair(g)
        weight = cast(Tensor, self.module.weight)  # not always a parameter: it may be normalised
        return G.shape[2:].numel() == weight.numel()


class LinearLayer(KroneckerLayer):
    """``y = W a + b``."""

    @property
    def kind(self) -> str:
        return "Linear"

    def features(self, x: Tensor, samples: int, counted: Tensor | None) -> Dense:
        a = x.reshape(samples, -1, 1, x.shape[-1])
        return Dense(_counted(a, counted), a)

    def by_position(self, g: Tensor, samples: int) -> Tensor:
        return g.reshape(len(g), samples, -1, g.shape[-1])


class TransposedLinearLayer(LinearLayer):
    """``y = Wᵀ a + b``: Hugging Face's Conv1D."""

    @property
    def kind(self) -> str:
        return "Conv1D (a linear layer)"

    @property
    def inputs_first(self) -> bool:
        return True


class ConvolutionLayer(KroneckerLayer):
    """``y_s = W a_s + b`` where a_s is the patch under the kernel, (C_in / groups) Π kernel."""

    @property
    def kind(self) -> str:
        return "convolution"

    @property
    def least_axes(self) -> int:
        return 2 + len(cast(nn.Conv2d, self.module).kernel_size)

    def features(self, x: Tensor, samples: int, counted: Tensor | None) -> Dense:
        module = cast(nn.Conv2d, self.module)
        a = patches(module, x).unflatten(0, (samples, -1)).flatten(1, 2)
        return Dense(_counted(a, counted), a)

    def by_position(self, g: Tensor, samples: int) -> Tensor:
        return g.movedim(2, -1).reshape(len(g), samples, -1, g.shape[2])


class LookupLayer(KroneckerLayer):
    """``y = Wᵀ e_i``, a unit vector for every index."""

    @property
    def kind(self) -> str:
        return "Embedding"

    @property
    def least_axes(self) -> int:
        return 1

    @property
    def inputs_first(self) -> bool:
        return True

    @property
    def reducible(self) -> bool:
        return False

    def features(self, x: Tensor, samples: int, counted: Tensor | None) -> OneHot:
        module = cast(nn.Embedding, self.module)
        ids = x.reshape(samples, -1)
        weights = _counted(ids.double(), counted)
        return OneHot(weights * self._learned(ids), ids, module.num_embeddings)

    def by_position(self, g: Tensor, samples: int) -> Tensor:
        return g.reshape(len(g), samples, -1, g.shape[-1])

    def without_padding(self, g: Tensor, x: Tensor, samples: int) -> Tensor:
        return g * self._learned(x.reshape(samples, -1))[..., None]

    def _learned(self, ids: Tensor) -> Tensor:
        """Whether a gradient reaches the row: none does at padding_idx."""
        padding = cast(nn.Embedding, self.module).padding_idx
        return torch.ones_like(ids, dtype=torch.bool) if padding is None else ids != padding


class ScaleLayer(Layer):
    """``y = w ∘ x̂ + b``, a normalisation: the gradients are ``Σ_s x̂_s ∘ g_s`` and ``Σ_s g_s``.

    The weight spans the last axes.
    """

    @property
    def kind(self) -> str:
        return "normalisation"

    def normalised(self, x: Tensor, samples: int) -> Tensor:
        """x̂: (N, S, d)."""
        with torch.no_grad(), self._with_scale(1):
            scaled = self.module.forward(x)
        with torch.no_grad(), self._with_scale(0):
            unscaled = self.module.forward(x)
        # The difference, as some scale by 1 + w.
        return self.by_position((scaled - unscaled)[None], samples)[0]

    def by_position(self, g: Tensor, samples: int) -> Tensor:
        return g.reshape(len(g), samples, -1, self._weight.numel())

    def fits(self, x: Tensor, y: Tensor, samples: int) -> bool:
        return x.shape == y.shape and y.shape[-self._weight.ndim :] == self._weight.shape

    @property
    def _weight(self) -> Tensor:
        return cast(Tensor, self.module.weight)

    @contextmanager
    def _with_scale(self, scale: float) -> Iterator[None]:
        """The module with every weight equal to ``scale``, and no bias."""
        parameters = self.module._parameters
        own = dict(parameters)
        for key, value in (("weight", scale), ("bias", 0.0)):
            tensor = own.get(key)
            if tensor is not None:
                parameters[key] = torch.full_like(tensor, value)  # type: ignore[assignment]
        try:
            yield
        finally:
            parameters.update(own)


class ChannelScaleLayer(ScaleLayer):
    """The same where the weight spans the second axis, as in BatchNorm and GroupNorm."""

    def by_position(self, g: Tensor, samples: int) -> Tensor:
        return super().by_position(g.movedim(2, -1), samples)

    def fits(self, x: Tensor, y: Tensor, samples: int) -> bool:
        return x.shape == y.shape and y.shape[1:2] == self._weight.shape


def _counted(a: Tensor, padding: Tensor | None) -> Tensor:
    """Ones (N, S), or the padding mask where it fits the positions."""
    if padding is not None and padding.shape == a.shape[:2]:
        return padding.to(a)
    return a.new_ones(a.shape[:2])
