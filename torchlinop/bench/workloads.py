"""The workloads of the benchmarks: a model, one batch, and the mean cross-entropy of both."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """All candidates differentiate ``loss``, of these data, by these parameters."""

    title: str
    model: nn.Module
    batch: Batch
    attention: bool = False  # then second derivatives need the mathematical attention kernel

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def size(self) -> int:
        """n, the number of parameters."""
        return sum(p.numel() for p in self.parameters)

    def first(self, samples: int) -> Workload:
        """The same with only the first few samples."""
        inputs, targets = self.batch
        terms = len(targets) // len(inputs)  # of each sample: a sequence has one for every token
        return replace(self, batch=(inputs[:samples], targets[: samples * terms]))

    @property
    def samples(self) -> Batch:
        """The batch with one target for every sample, or a row of them if it is a sequence."""
        inputs, targets = self.batch
        return inputs, targets.view(len(inputs), -1).squeeze(1)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits: a row for every term of the loss, a sample or a token."""
        logits: Tensor = model(batch[0])
        return logits

    def loss_of_outputs(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The mean cross-entropy of logits."""
        return nn.functional.cross_entropy(outputs, batch[1].flatten())

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.loss_of_outputs(self.outputs(model, batch), batch)


class NextTokenLogits(nn.Module):
    """Token ids (batch, length) to logits (batch * length, vocabulary) of a Hugging Face model."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.language_model(ids, use_cache=False).logits
        return logits.flatten(0, 1)


def mlp(device: torch.device) -> Workload:
    """64-256-256-10 on 1,797 rows, the shape of scikit-learn's digits (n = 85,002)."""
    torch.manual_seed(0)
    hidden = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
    model = nn.Sequential(*hidden, nn.Linear(256, 10))
    batch = torch.randn(1797, 64), torch.randint(10, (1797,))
    return placed(device, "MLP 64-256-256-10, 1,797 rows", model, batch)


def cnn(device: torch.device) -> Workload:
    """Two convolutions, each with ReLU and pooling, and a linear layer on 128 images."""
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(32 * 8 * 8, 10))
    batch = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    return placed(device, "CNN, 128 images 3x32x32", model, batch)


def gpt2(device: torch.device) -> Workload:
    """A GPT-2 of 4 layers, width 128 and 5,000 tokens, on 4 sequences of 128 tokens."""
    config = {"n_layer": 4, "n_embd": 128, "n_head": 4, "vocab_size": 5000, "n_positions": 128}
    title = "GPT-2, 4 layers d=128 V=5000, 4x128 tokens"
    return language_model(device, title, "GPT2", config, (4, 128))


def language_model(
    device: torch.device,
    title: str,
    name: str,
    config: dict[str, Any],
    shape: tuple[int, int],
) -> Workload:
    """A language model of transformers by its config, with random weights, on random tokens.

    Raises:
        ModuleNotFoundError: transformers is missing.
    """
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    made = getattr(transformers, f"{name}Config")(**config)
    head = {"GPT2": "GPT2LMHeadModel", "Llama": "LlamaForCausalLM"}[name]
    model = NextTokenLogits(getattr(transformers, head)(made))
    sequences, length = shape
    tokens = torch.randint(made.vocab_size, (sequences, length + 1))
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()
    return placed(device, title, model, batch, attention=True)


def vocabulary(device: torch.device) -> Workload:
    """An embedding (d=32) and a head of 20,000 tokens on 1,024 tokens: 80 MB of logits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20000, 32), nn.Linear(32, 20000))
    batch = torch.randint(20000, (1024,)), torch.randint(20000, (1024,))
    return placed(device, "embedding d=32 and head, V=20,000, 1,024 tokens", model, batch)


WORKLOADS: dict[str, Callable[[torch.device], Workload]] = {
    "mlp": mlp,
    "cnn": cnn,
    "gpt2": gpt2,
    "vocabulary": vocabulary,
}
TIMED = ("mlp", "cnn", "gpt2")


def placed(
    device: torch.device, title: str, model: nn.Module, batch: Batch, attention: bool = False
) -> Workload:
    """In evaluation mode, on the device."""
    inputs, targets = batch
    there = inputs.to(device), targets.to(device)
    return Workload(title, model.eval().to(device), there, attention)
