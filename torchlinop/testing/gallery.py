"""Small models and data, seeded and without downloads, on which operators are judged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

Loss = Callable[[nn.Module, Any], Tensor]
Forward = Callable[[nn.Module, Any], Tensor]


def of_inputs(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """The model's outputs for the first part of a batch."""
    outputs: Tensor = model(batch[0])
    return outputs


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A language model's logits (N, T, V) for padded rows."""
    logits: Tensor = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits


@dataclass(frozen=True)
class Problem:
    """A model, batches and a loss, with the loss on all data in one piece for the oracle."""

    model: nn.Module
    batches: list[Any]
    loss_fn: Loss  # the mean over the loss terms of a batch
    full_batch: Any
    forward_fn: Forward = of_inputs
    criterion: nn.Module = field(default_factory=nn.CrossEntropyLoss)  # as in loss_fn

    def full_loss(self) -> Tensor:
        """The objective, evaluated at once by the model's own parameters."""
        return self.loss_fn(self.model, self.full_batch)

    def outputs(self) -> Tensor:
        """The outputs for all data at once, by the model's own parameters."""
        return self.forward_fn(self.model, self.full_batch)

    def loss_of_outputs(self, outputs: Tensor) -> Tensor:
        """The objective as a function of the outputs for all data."""
        loss: Tensor = self.criterion(outputs, *self.full_batch[1:])
        return loss

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of ``(inputs, labels)``; labels of -100 are left out."""
    return F.cross_entropy(model(batch[0]), batch[1])


def mean_squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error over all entries of ``(inputs, targets)``."""
    return F.mse_loss(model(batch[0]), batch[1])


def next_token_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the unmasked next tokens, in the precision of the model."""
    logits = logits_of(model, batch)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def hugging_face_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss a Hugging Face model computes itself, always in float32."""
    loss: Tensor = model(**batch).loss
    return loss


def in_batches(full: Any, *sizes: int) -> list[Any]:
    """A tuple or dict of tensors cut along the first axis into batches of the given sizes."""
    if isinstance(full, dict):
        columns = [t.split(list(sizes)) for t in full.values()]
        return [dict(zip(full, parts, strict=True)) for parts in zip(*columns, strict=True)]
    return list(zip(*(t.split(list(sizes)) for t in full), strict=True))


def unreduced(criterion: nn.Module, outputs: Tensor, *targets: Tensor) -> Tensor:
    """The loss terms (N,) of a torch loss: one a sample or token, summed over its outputs."""
    criterion = copy.copy(criterion)
    criterion.reduction = "none"  # type: ignore[assignment]
    losses: Tensor = criterion(outputs, *targets)
    if losses.ndim > 1 and not isinstance(criterion, nn.CrossEntropyLoss):
        losses = losses.sum(-1)
    return losses.flatten()


def supervised(
    model: nn.Module, full: tuple[Tensor, ...], sizes: tuple[int, ...], criterion: nn.Module
) -> Problem:
    """The problem of a torch loss between outputs and targets, on batches of these sizes."""

    def loss_fn(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        loss: Tensor = criterion(of_inputs(model, batch), *batch[1:])
        return loss

    return Problem(model, in_batches(full, *sizes), loss_fn, full, criterion=criterion)


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


def _language_problem(model: nn.Module, vocabulary: int, sizes: tuple[int, ...]) -> Problem:
    tokens = torch.randint(0, vocabulary, (sum(sizes), 7))
    lengths = torch.tensor([7, 4, 5, 2, 6, 3])[: sum(sizes)]
    mask = (torch.arange(7) < lengths[:, None]).long()
    full = {
        "input_ids": tokens,
        "attention_mask": mask,
        "labels": tokens.masked_fill(mask == 0, -100),
    }
    batches = in_batches(full, *sizes)
    return Problem(model.eval(), batches, next_token_loss, full, forward_fn=logits_of)


def gpt2(dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = (3, 2, 1)) -> Problem:
    """GPT-2 from a small config (tied head, default attention) on padded rows with -100 labels."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=7, n_positions=8, n_embd=4, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model: nn.Module = GPT2LMHeadModel(config)
    return _language_problem(model.to(dtype), 7, sizes)


def llama(dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = (3, 2, 1)) -> Problem:
    """Llama from a small config (SiLU, RMSNorm, rotary positions, grouped heads), padded rows.

    Its own RMSNorm computes in float32 whatever the dtype, so torch's takes its place.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=7,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: nn.Module = LlamaForCausalLM(config)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            model.set_submodule(name, nn.RMSNorm(4, eps=config.rms_norm_eps))
    return _language_problem(model.to(dtype), 7, sizes)


class _Recurrent(nn.Module):
    def __init__(self, cell: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = cell(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(x)[0][:, -1])
        return out


def recurrent(
    cell: Callable[..., nn.RNNBase] = nn.LSTM,
    dtype: torch.dtype = torch.float64,
    sizes: tuple[int, ...] = (4, 3),
) -> Problem:
    """An LSTM or GRU read out at its last step, on 7 sequences of 5 steps."""
    torch.manual_seed(4)
    full = (torch.randn(7, 5, 3, dtype=dtype), torch.randint(0, 2, (7,)))
    return Problem(_Recurrent(cell).to(dtype), in_batches(full, *sizes), cross_entropy, full)


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.mix(self.embed(tokens))))
        return out


def tied(dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = (4, 3)) -> Problem:
    """An embedding whose weight is also the output layer's."""
    torch.manual_seed(5)
    full = (torch.randint(0, 7, (7,)), torch.randint(0, 7, (7,)))
    return Problem(_Tied().to(dtype), in_batches(full, *sizes), cross_entropy, full)


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


def group_norm(dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = (3, 2, 2)) -> Problem:
    """A convolution, GroupNorm and SiLU on 7 images (n = 99)."""
    torch.manual_seed(12)
    norm = nn.GroupNorm(2, 4)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.SiLU(), nn.Flatten(), nn.Linear(16, 3))
    model = model.to(dtype)
    full = (torch.randn(7, 1, 4, 4, dtype=dtype), torch.randint(0, 3, (7,)))
    return supervised(model, full, sizes, nn.CrossEntropyLoss())


def weight_norm(dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = (3, 2, 2)) -> Problem:
    """A tanh MLP whose layers are parametrized by direction and length (n = 33)."""
    torch.manual_seed(13)
    layers = [parametrizations.weight_norm(nn.Linear(i, o)) for i, o in ((4, 3), (3, 3))]
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1]).to(dtype)
    full = (torch.randn(7, 4, dtype=dtype), torch.randint(0, 3, (7,)))
    return supervised(model, full, sizes, nn.CrossEntropyLoss())


class _SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))
        return out


def attention(dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = (3, 2, 2)) -> Problem:
    """Torch's own multi-head attention on 7 sequences of 5 steps (n = 95)."""
    torch.manual_seed(14)
    full = (torch.randn(7, 5, 4, dtype=dtype), torch.randint(0, 3, (7,)))
    return supervised(_SelfAttention().to(dtype), full, sizes, nn.CrossEntropyLoss())


class _MeanOverSteps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def transformer(dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = (3, 2, 2)) -> Problem:
    """Torch's own encoder layer, with GELU, on 7 sequences of 5 steps (n = 142)."""
    torch.manual_seed(15)
    layer = nn.TransformerEncoderLayer(4, 2, 3, 0.0, "gelu", batch_first=True)
    model = nn.Sequential(layer, _MeanOverSteps(), nn.Linear(4, 3)).to(dtype).eval()
    full = (torch.randn(7, 5, 4, dtype=dtype), torch.randint(0, 3, (7,)))
    return supervised(model, full, sizes, nn.CrossEntropyLoss())


class Cube(torch.autograd.Function):
    """x³, with a backward pass by hand: no forward rule, and none for vmap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return 3 * x**2 * grads[0]


class _Cubes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Cube.apply(x)
        return out


def custom_function(
    dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = (3, 2, 2)
) -> Problem:
    """An MLP with an autograd Function of the user's own (n = 27)."""
    torch.manual_seed(16)
    model = nn.Sequential(nn.Linear(4, 3), _Cubes(), nn.Linear(3, 3)).to(dtype)
    full = (torch.randn(7, 4, dtype=dtype), torch.randint(0, 3, (7,)))
    return supervised(model, full, sizes, nn.CrossEntropyLoss())


def convolutions(dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = (3, 2, 2)) -> Problem:
    """Convolutions in groups with circular padding, and with dilation and stride (n = 101)."""
    torch.manual_seed(17)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular", groups=2),
        nn.Tanh(),
        nn.Conv2d(4, 2, 2, dilation=2, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8, 3),
    ).to(dtype)
    full = (torch.randn(7, 2, 6, 6, dtype=dtype), torch.randint(0, 3, (7,)))
    return supervised(model, full, sizes, nn.CrossEntropyLoss())


class _Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))
        return out


def reused_module(
    dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = (3, 2, 2)
) -> Problem:
    """A layer through which the data pass twice (n = 35)."""
    torch.manual_seed(18)
    full = (torch.randn(7, 4, dtype=dtype), torch.randint(0, 3, (7,)))
    return supervised(_Reused().to(dtype), full, sizes, nn.CrossEntropyLoss())


def with_spectrum(eigenvalues: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A symmetric matrix with these eigenvalues (n,) and its eigenvectors (n, n), as columns.

    The eigenvectors are Haar distributed: the Q of a Gaussian matrix with R's diagonal positive.
    """
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    Q, R = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    Q = (Q * R.diagonal().sign()).to(eigenvalues.dtype)
    A = (Q * eigenvalues) @ Q.T
    return (A + A.T) / 2, Q
