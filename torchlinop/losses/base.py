"""L(f) = Σ_n ω_n ℓ_n(f_n): a loss of the model's outputs as a weighted sum of loss terms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlinop.batches import Batch
from torchlinop.errors import OptionError
from torchlinop.weighting import Weighting

# u (*leading, *outputs.shape) -> M u of the same shape. May overwrite u, and may return it.
OutputMap = Callable[[Tensor], Tensor]

# Shape (samples, ...) -> numbers in (0, 1), pinned for every sample whatever batch it is in.
Uniform = Callable[[torch.Size], Tensor]


@dataclass(frozen=True)
class Terms:
    """Gradients of the loss terms, each with respect to its own entries of the outputs."""

    gradients: Tensor  # ∂ℓ_n/∂f_n in the shape of the outputs, without the weights ω_n
    weights: Tensor  # ω_n, broadcastable to the outputs; 0 for terms that are left out
    dims: tuple[int, ...]  # the (negative) axes of the outputs along which one term extends

    @property
    def total(self) -> Tensor:
        """Σ_n ω_n, a scalar."""
        shape = list(self.gradients.shape)
        for dim in self.dims:
            shape[dim] = 1
        return self.weights.expand(shape).sum()

    def outer(self) -> OutputMap:
        """``u ↦ Σ_n ω_n g_n (g_nᵀ u)``."""

        def product(u: Tensor) -> Tensor:
            inner = u.mul_(self.gradients)
            if self.dims:
                inner = inner.sum(self.dims, keepdim=True)
            return (inner * self.weights) * self.gradients

        return product


class LossOfOutput(ABC):
    """A loss ``(outputs, batch) -> scalar`` and its derivatives with respect to the outputs.

    A loss term n (a sample, a token) reads its own entries f_n of the outputs and no others. The
    loss is ``Σ_n ω_n ℓ_n``; for a mean, ω_n is one over the number of terms.
    """

    weighting: Weighting | None = None  # what a batch counts; None leaves it to be measured

    @abstractmethod
    def __call__(self, outputs: Tensor, batch: Batch) -> Tensor:
        """L, a scalar."""

    @abstractmethod
    def hessian(self, outputs: Tensor, batch: Batch) -> OutputMap:
        """``u ↦ ∇²L u`` at these outputs; what depends on them alone is computed once."""

    @abstractmethod
    def terms(self, outputs: Tensor, batch: Batch) -> Terms:
        """Gradients and weights of the loss terms."""

    @abstractmethod
    def root(self, outputs: Tensor, batch: Batch) -> Tensor:
        """S of shape (C, *outputs.shape) with ``Σ_c S_c S_cᵀ = ω_n ∇²ℓ_n`` for every term n."""

    def with_weighting(self, weighting: Weighting) -> LossOfOutput:
        """The same loss; one that does not know the weights of its terms takes them from this."""
        return self

    def fisher(self, outputs: Tensor, batch: Batch) -> OutputMap:
        """``u ↦ Σ_n ω_n E[g_n g_nᵀ] u``, targets drawn from the model's own distribution.

        Raises:
            OptionError: the loss is not the negative logarithm of a known distribution.
        """
        raise OptionError(_no_distribution(self))

    def sampled(self, outputs: Tensor, batch: Batch, uniform: Uniform) -> Terms:
        """The terms with targets drawn from the model's own distribution.

        Raises:
            OptionError: the loss is not the negative logarithm of a known distribution.
        """
        raise OptionError(_no_distribution(self))

    def refuse_unless_likelihood(self) -> None:
        """Raise OptionError if there is no ``fisher``."""
        if type(self).fisher is LossOfOutput.fisher:
            raise OptionError(_no_distribution(self))

    def hvp(self, outputs: Tensor, batch: Batch, u: Tensor) -> Tensor:
        """``∇²L u`` as new memory, for u of shape (*leading, *outputs.shape)."""
        return self.hessian(outputs, batch)(u.clone())


def _no_distribution(loss: LossOfOutput) -> str:
    return (
        f"{loss!r} is not the negative log-likelihood of a distribution that is known here, so it "
        "has no Fisher matrix; use GGNOperator, or a loss such as CrossEntropyLoss or MSELoss"
    )
