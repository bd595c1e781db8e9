"""Small models with recurrence, attention, normalization and the like, seeded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from torchlinop.testing.model_problem import (
    Problem,
    cross_entropy,
    in_batches,
    logits_of,
    next_token_loss,
    supervised,
)


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
