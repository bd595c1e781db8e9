"""Small models and data, seeded and without downloads, on which operators are judged."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchlinop.testing.architectures import (
    Cube,
    attention,
    convolutions,
    custom_function,
    gpt2,
    group_norm,
    llama,
    recurrent,
    reused_module,
    tied,
    transformer,
    weight_norm,
)
from torchlinop.testing.model_problem import (
    Forward,
    Loss,
    Problem,
    cross_entropy,
    hugging_face_loss,
    in_batches,
    logits_of,
    mean_squared_error,
    next_token_loss,
    of_inputs,
    supervised,
    unreduced,
)

__all__ = [
    "Checkpointed",
    "Cube",
    "Forward",
    "Loss",
    "Problem",
    "attention",
    "binary",
    "checkpointed",
    "cnn",
    "convolutions",
    "cross_entropy",
    "custom_function",
    "deep_linear",
    "gpt2",
    "group_norm",
    "hugging_face_loss",
    "in_batches",
    "labelled_sequences",
    "llama",
    "logits_of",
    "masked_labels",
    "mean_squared_error",
    "mlp",
    "next_token_loss",
    "of_inputs",
    "real_sequences",
    "recurrent",
    "regression",
    "reused_module",
    "supervised",
    "tied",
    "transformer",
    "unreduced",
    "weight_norm",
    "weighted_classes",
    "with_spectrum",
]


def mlp(dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = (9, 9, 5)) -> Problem:
    """A tanh MLP on 23 samples of 6 features in 3 classes (n = 53)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    full = (torch.randn(23, 6, dtype=dtype), torch.randint(0, 3, (23,)))
    return Problem(model, in_batches(full, *sizes), cross_entropy, full)


def cnn(dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = (5, 4, 2)) -> Problem:
    """A CNN with BatchNorm (statistics of its own) and Dropout, in eval mode, on 11 images."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(3 * 9, 4),
    ).to(dtype)
    full = (torch.randn(11, 1, 6, 6, dtype=dtype), torch.randint(0, 4, (11,)))
    model.train()
    model(full[0])  # running statistics that are not the default ones
    return Problem(model.eval(), in_batches(full, *sizes), cross_entropy, full)


class Checkpointed(nn.Module):
    """Two layers whose activations are recomputed in the backward pass."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)
        self.use_reentrant = use_reentrant

    def _hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()  # reentrant checkpointing wants such an input
        hidden = checkpoint(self._hidden, x, use_reentrant=self.use_reentrant)
        out: Tensor = self.second(hidden)
        return out


def checkpointed(
    use_reentrant: bool = False,
    dtype: torch.dtype = torch.float64,
    sizes: tuple[int, ...] = (9, 9, 5),
) -> Problem:
    """The MLP of ``mlp`` with activation checkpointing."""
    plain = mlp(dtype, sizes)
    torch.manual_seed(6)
    model = Checkpointed(use_reentrant).to(dtype)
    return Problem(model, plain.batches, cross_entropy, plain.full_batch)


def regression(dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = (5, 4, 2)) -> Problem:
    """A tanh MLP on 11 samples with 2 real targets each, by mean squared error (n = 23)."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)
    full = (torch.randn(11, 4, dtype=dtype), torch.randn(11, 2, dtype=dtype))
    return supervised(model, full, sizes, nn.MSELoss())


def binary(dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = (5, 4, 2)) -> Problem:
    """A tanh MLP on 11 samples with 2 independent binary labels each (n = 23)."""
    torch.manual_seed(8)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)
    full = (torch.randn(11, 4, dtype=dtype), torch.randint(0, 2, (11, 2)).to(dtype))
    return supervised(model, full, sizes, nn.BCEWithLogitsLoss())


def weighted_classes(
    dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = (9, 9, 5)
) -> Problem:
    """The MLP of ``mlp`` with class weights: batches count the weights of their labels."""
    plain = mlp(dtype)
    criterion = nn.CrossEntropyLoss(torch.tensor([0.2, 1.0, 3.0], dtype=dtype))
    return supervised(plain.model, plain.full_batch, sizes, criterion)


def masked_labels(
    dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = (9, 9, 5)
) -> Problem:
    """The MLP of ``mlp`` with every third label left out, and nearly all of the last batch's."""
    plain = mlp(dtype)
    X, y = plain.full_batch
    left_out = (torch.arange(len(y)) % 3 == 0) | (torch.arange(len(y)) > 19)
    full = (X, y.masked_fill(left_out, -100))
    return supervised(plain.model, full, sizes, nn.CrossEntropyLoss())


class _Mixing(nn.Module):
    def __init__(self, steps: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inner = nn.Linear(inputs, 3)
        self.across = nn.Linear(steps, steps)
        self.head = nn.Linear(3, outputs)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x))
        hidden = torch.tanh(self.across(hidden.mT)).mT
        out: Tensor = self.head(hidden)
        return out


class _ClassesFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT  # (N, T, C) to the (N, C, T) of torch's cross-entropy


def labelled_sequences(
    dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = (3, 2, 1)
) -> Problem:
    """6 sequences of 4 steps with a label each; every output reads all steps (n = 44)."""
    torch.manual_seed(9)
    model = nn.Sequential(_Mixing(4, 3, 3), _ClassesFirst()).to(dtype)
    full = (torch.randn(6, 4, 3, dtype=dtype), torch.randint(0, 3, (6, 4)))
    return supervised(model, full, sizes, nn.CrossEntropyLoss())


def real_sequences(
    dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = (3, 2, 1)
) -> Problem:
    """6 sequences of 4 steps with 2 real targets each; every output reads all steps (n = 40)."""
    torch.manual_seed(10)
    model = _Mixing(4, 3, 2).to(dtype)
    full = (torch.randn(6, 4, 3, dtype=dtype), torch.randn(6, 4, 2, dtype=dtype))
    return supervised(model, full, sizes, nn.MSELoss())


def deep_linear(dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = (5, 4, 2)) -> Problem:
    """Three linear layers without bias and squared errors, where K-FAC is exact (n = 27)."""
    torch.manual_seed(11)
    layers = [nn.Linear(i, o, bias=False) for i, o in ((4, 3), (3, 3), (3, 2))]
    full = (torch.randn(11, 4, dtype=dtype), torch.randn(11, 2, dtype=dtype))
    return supervised(nn.Sequential(*layers).to(dtype), full, sizes, nn.MSELoss())


def with_spectrum(eigenvalues: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A symmetric matrix with these eigenvalues (n,) and its eigenvectors (n, n), as columns.

    The eigenvectors are Haar distributed: the Q of a Gaussian matrix with R's diagonal positive.
    """
    Q = _haar(len(eigenvalues), seed).to(eigenvalues.dtype, copy=True)
    A = (Q * eigenvalues) @ Q.T
    return (A + A.T) / 2, Q


@functools.lru_cache(maxsize=2)  # tests ask for one size again and again
def _haar(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    Q, R = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    haar: Tensor = Q * R.diagonal().sign()
    return haar
