"""Errors of finite differences by step and precision, and what diagonal blocks leave out.

On a character GPT that is trained for a minute on the help texts of Python. Writes
docs/benchmarks/finite_differences.json and, where matplotlib is installed, the picture of it:

    python tests/benchmarks/difference_steps.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlinop import HessianOperator, lanczos

DOCS = Path(__file__).parents[2] / "docs"
CONTEXT, WIDTH, HEADS, LAYERS = 32, 32, 2, 4
STEPS, SAMPLES = 400, 16
RELATIVE = [10 ** (k / 2) for k in range(-18, -1)]  # |θ₊ − θ₋| / 2|θ|, from 1e-9 to 0.1
PRECISIONS = {"float64": torch.float64, "float32": torch.float32, "bfloat16 compute": None}


class Block(nn.Module):
    """Attention and an MLP, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 4 * WIDTH),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * WIDTH, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, -1)
        )
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class CharacterGPT(nn.Module):
    """Next characters from the last ones."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, characters)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(x) + self.position)))


def loss(model: Callable, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def trained() -> tuple[CharacterGPT, list, float]:
    """The model, one batch, and its loss."""
    torch.manual_seed(0)
    text = "".join(topics.values())
    known = sorted({*text})
    codes = torch.tensor([known.index(c) for c in text])

    def batch() -> tuple[Tensor, Tensor]:
        starts = torch.randint(0, len(codes) - CONTEXT - 1, (SAMPLES,))
        windows = torch.stack([codes[s : s + CONTEXT + 1] for s in starts])
        return windows[:, :-1], windows[:, 1:]

    model = CharacterGPT(len(known))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss(model, batch())
        value.backward()
        optimizer.step()
    return model, [batch()], float(value)


def gradient(model: nn.Module, shapes: dict, batch: tuple, dtype: torch.dtype | None) -> Callable:
    """θ ↦ ∇L(θ), computed in a dtype; None is float32 shards and bfloat16 computation."""
    compute = dtype or torch.bfloat16

    def of(theta: Tensor) -> Tensor:
        theta = theta.detach().requires_grad_()
        parts = theta.split([shape.numel() for shape in shapes.values()])
        named = {n: p.view(s).to(compute) for (n, s), p in zip(shapes.items(), parts, strict=True)}
        value = loss(lambda x: torch.func.functional_call(model, named, x), batch)
        return torch.autograd.grad(value.float() if dtype is None else value, theta)[0]

    return of


def difference(g: Callable, theta: Tensor, v: Tensor, relative: float) -> Tensor:
    """The central difference with the step as it was rounded."""
    unit = (v / v.norm()).to(theta.dtype)
    plus = theta + relative * theta.norm() * unit
    minus = theta - relative * theta.norm() * unit
    moved = (plus - minus).double() @ unit.double()
    return (g(plus).double() - g(minus).double()) * (v.norm() / moved)


def measured() -> dict:
    """Everything on the page."""
    model, data, final = trained()
    double = CharacterGPT(model.head.out_features).double()
    double.load_state_dict(model.state_dict())
    H = HessianOperator(double, data, loss)
    theta = H.objective.theta
    pair = lanczos(H, 1)
    vectors = {"random v": H.space.random(1)[:, 0], "top eigenvector": pair.eigenvectors[:, 0]}
    exact = {name: H @ v for name, v in vectors.items()}
    shapes = {slot.name: slot.shape for slot in H.layout.slots}
    curves: dict = {}
    for precision, dtype in PRECISIONS.items():
        g = gradient(double.to(dtype or torch.bfloat16), shapes, data[0], dtype)
        at = theta.to(dtype or torch.float32)
        for name, v in vectors.items():
            error = [
                float((difference(g, at, v, c) - exact[name]).norm() / exact[name].norm())
                for c in RELATIVE
            ]
            curves[f"{precision}, {name}"] = error
    double.double().load_state_dict(model.state_dict())
    g = gradient(double.bfloat16(), shapes, data[0], None)
    flat = theta.float()

    def coarse(v: Tensor) -> Tensor:
        return difference(g, flat, v, 3e-4)

    return {
        "parameters": H.size,
        "loss": final,
        "eigenvalue": float(pair.eigenvalues[0]),
        "relative_steps": RELATIVE,
        "errors": curves,
        "coupling": coupling(H.matvec, H),
        "coupling of bfloat16 differences": coupling(coarse, H),
    }


def coupling(A: Callable, H: HessianOperator) -> list[dict]:
    """The metrics of every transformer block and of the rest, over 32 probes."""
    groups: dict[str, list[Tensor]] = {}
    for slot in H.layout.slots:
        label = ".".join(slot.name.split(".")[:2]) if "blocks" in slot.name else "rest"
        groups.setdefault(label, []).append(torch.arange(slot.offset, slot.stop))
    indices = {label: torch.cat(parts) for label, parts in groups.items()}
    f = {label: [] for label in indices}
    k = {label: [] for label in indices}
    for v in H.space.random(32, seed=7).unbind(1):
        product = A(v)
        for label, rows in indices.items():
            masked = torch.zeros_like(v).index_copy(0, rows, v[rows])
            f[label].append(product[rows])
            k[label].append(A(masked)[rows])
    found = []
    for label in indices:
        full, block = torch.stack(f[label]), torch.stack(k[label])
        error = (full - block).norm() / full.norm()
        cosine = (full * block).sum() / (full.norm() * block.norm())
        found.append({"block": label, "relative error": float(error), "cosine": float(cosine)})
    return found


def draw(found: dict, path: Path) -> None:
    """Error against step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    colours = dict(zip(PRECISIONS, ("C0", "C1", "C3"), strict=True))
    for name, error in found["errors"].items():
        precision, vector = name.split(", ")
        style = "-" if vector == "random v" else "--"
        ax.loglog(found["relative_steps"], error, style, color=colours[precision], label=name)
    ax.axvspan(1e-4, 1e-3, color="0.9", label="steps of the paper")
    ax.set_xlabel("relative step |θ₊ − θ₋| / 2|θ|")
    ax.set_ylabel("relative error of H v")
    ax.set_ylim(1e-12, 1e4)
    ax.legend(fontsize=7)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    torch.set_num_threads(1)
    output = DOCS / "benchmarks" / "finite_differences.json"
    if "draw" not in sys.argv:
        output.write_text(json.dumps(measured(), indent=1) + "\n")
    draw(json.loads(output.read_text()), DOCS / "images" / "finite_differences.png")
