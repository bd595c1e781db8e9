"""What a GPU is measured on: an MLP, ResNet-18, GPT-2 small, SmolLM2; and tiny ones of a kind."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlinop.bench import workloads
from torchlinop.bench.workloads import Workload, language_model, placed


class BasicBlock(nn.Module):
    """``relu(x + f(x))`` with two convolutions and batch normalisations in f (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if (inputs, stride) != (outputs, 1):
            project = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(project, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(y)))


def resnet(widths: tuple[int, ...], blocks: int, classes: int) -> nn.Sequential:
    """A ResNet for small images: every width but the first halves the resolution."""
    stem = [nn.Conv2d(3, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    body: list[nn.Module] = []
    for before, width in zip((widths[0], *widths), widths, strict=False):
        body += [BasicBlock(before, width, 1 if width == before else 2)]
        body += [BasicBlock(width, width, 1) for _ in range(blocks - 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes)]
    return nn.Sequential(*stem, *body, *head)


def mlp(device: torch.device, tiny: bool) -> Workload:
    """64-256-256-10 on 1,797 rows (n = 85,002)."""
    if not tiny:
        return workloads.mlp(device)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    batch = torch.randn(12, 6), torch.randint(4, (12,))
    return placed(device, "MLP 6-8-4, 12 rows", model, batch)


def resnet18(device: torch.device, tiny: bool) -> Workload:
    """ResNet-18 for 32x32 images, statistics fixed (n = 11,173,962)."""
    torch.manual_seed(0)
    images, side = (4, 8) if tiny else (128, 32)
    model = resnet((2, 4), 1, 4) if tiny else resnet((64, 128, 256, 512), 2, 10)
    batch = torch.randn(images, 3, side, side), torch.randint(4, (images,))
    name = "ResNet of 2 blocks" if tiny else "ResNet-18"
    return placed(device, f"{name}, {images} images 3x{side}x{side}", model, batch)


def gpt2(device: torch.device, tiny: bool) -> Workload:
    """GPT-2 small by its config (n = 124,439,808), on 8 sequences of 128 tokens."""
    small = {"n_layer": 1, "n_embd": 4, "n_head": 2, "vocab_size": 11, "n_positions": 8}
    config = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **(small if tiny else {})}
    if tiny:
        return language_model(device, "GPT-2 of 1 layer, 2x4 tokens", "GPT2", config, (2, 4))
    return language_model(device, "GPT-2 small, 8x128 tokens", "GPT2", config, (8, 128))


def smollm2(device: torch.device, tiny: bool) -> Workload:
    """SmolLM2-135M by its config (n = 134,515,008), on 8 sequences of 128 tokens.

    Its base of rotary positions is left at the default: the price does not depend on it.
    """
    config = {
        "vocab_size": 11 if tiny else 49152,
        "hidden_size": 4 if tiny else 576,
        "intermediate_size": 6 if tiny else 1536,
        "num_hidden_layers": 1 if tiny else 30,
        "num_attention_heads": 2 if tiny else 9,
        "num_key_value_heads": 1 if tiny else 3,
        "max_position_embeddings": 8 if tiny else 8192,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if tiny:
        return language_model(device, "Llama of 1 layer, 2x4 tokens", "Llama", config, (2, 4))
    return language_model(device, "SmolLM2-135M, 8x128 tokens", "Llama", config, (8, 128))


WORKLOADS: dict[str, Callable[[torch.device, bool], Workload]] = {
    "mlp": mlp,
    "resnet18": resnet18,
    "gpt2": gpt2,
    "smollm2": smollm2,
}
SMALL = ("mlp", "resnet18")  # bound by launches in their eager form
