"""What a Hessian of 10¹¹ parameters on 64 GPUs would cost, from stated assumptions: on paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torchlinop.bench.tables import table

GB = 1e9

# The model and the data: a transformer of this many blocks and this width.
N, BLOCKS, WIDTH = 100e9, 80, 10_240
TOKENS = 2**20  # 512 sequences of 2,048
INSIDE = 17  # activations of a block, in entries per token and unit of width, attention fused

# The machine: 8 nodes of 8 H100 (SXM).
GPUS, MEMORY = 64, 80 * GB
RATE = {2: 0.4 * 989e12, 4: 0.67 * 67e12}  # operations/s reached, by bytes of a number
NETWORK = 50e9  # B/s that a GPU receives in an all-gather over all nodes
HBM = 2.5e12  # B/s
SHARD = N / GPUS


@dataclass(frozen=True)
class Method:
    """A way to multiply, under FSDP2 with one block gathered and one on its way."""

    name: str
    gradients: float  # of work
    number: int  # bytes of a number in compute: 2 for bf16, 4 for float32
    passes: int  # over the parameters, forward and backward, of each microbatch
    vectors_gathered: int  # besides: of the vector
    duals: int  # 2 if tangents accompany activations
    recomputes: bool  # activations, block by block
    tokens: int  # that a GPU takes at once
    note: str = ""

    @property
    def microbatches(self) -> float:
        return TOKENS / GPUS / self.tokens

    @property
    def compute(self) -> float:
        """Seconds: 6 n T operations a gradient, and 2 n T for the activations once more."""
        return self.gradients * 8 * N * TOKENS / GPUS / RATE[self.number]

    @property
    def network(self) -> float:
        """Seconds: all parameters are gathered in each pass, gradients are scattered in float32."""
        gathered = (self.passes + self.vectors_gathered) * N * self.number
        scattered = self.passes / 2 * N * 4
        return self.microbatches * (gathered + scattered) / NETWORK

    @property
    def seconds(self) -> float:
        """Communication overlaps with computation."""
        return max(self.compute, self.network)

    @property
    def collectives(self) -> str:
        gathers = self.microbatches * BLOCKS * (self.passes + self.vectors_gathered)
        scatters = self.microbatches * BLOCKS * self.passes / 2
        return f"{gathers:,.0f} + {scatters:,.0f}"

    @property
    def activations(self) -> float:
        """Bytes: the inputs of all blocks and the inside of one, or the inside of all."""
        entries = (BLOCKS + INSIDE) if self.recomputes else BLOCKS * INSIDE
        return self.duals * entries * WIDTH * self.tokens * self.number


@dataclass(frozen=True)
class Basis:
    """Vectors that a solver keeps."""

    name: str
    vectors: int
    number: int  # bytes


GRADIENT_BF16 = Method("gradient, bf16", 1, 2, 2, 0, 1, True, 8192)
DIFFERENCES_FP32 = Method("differences, float32", 2, 4, 4, 0, 1, True, 4096, "errors 10⁻⁴ relative")
DIFFERENCES_BF16 = Method(
    "differences, bf16", 2, 2, 4, 0, 1, True, 8192, "errors of 10 % and more: refused"
)
EXACT = Method("exact, bf16", 4, 2, 2, 2, 2, False, 512, "errors 1 %: what this library has today")
EXACT_BLOCKS = Method(
    "exact, bf16, block by block", 3.9, 2, 3, 3, 2, True, 4096, "errors 1 %; shown in one process"
)
METHODS = (GRADIENT_BF16, DIFFERENCES_BF16, DIFFERENCES_FP32, EXACT, EXACT_BLOCKS)

TWO_VECTORS = Basis("three-term recurrence, eigenvalues only", 2, 4)
BASES = (
    TWO_VECTORS,
    Basis("thick restart, 8 vectors, float32", 8, 4),
    Basis("thick restart, 8 vectors, bf16 or fp16", 8, 2),
    Basis("thick restart, 20 vectors, float32", 20, 4),
    Basis("thick restart, 20 vectors, bf16 or fp16", 20, 2),
    Basis("no restart, 100 vectors, bf16 or fp16", 100, 2),
)


def memory(method: Method, basis: Basis) -> Mapping[str, float]:
    """Bytes of a rank, by what they are for."""
    gathered = 2 * N / BLOCKS * method.number * (2 if method.vectors_gathered else 1)
    return {
        "parameters": 4 * SHARD,
        "copy of them": 4 * SHARD if method.passes == 4 else 0.0,  # that differences restore
        "gradient": 4 * SHARD,
        "v and A v": 2 * 4 * SHARD,
        "two blocks gathered": gathered,
        "activations": method.activations,
        "basis": basis.vectors * basis.number * SHARD,
    }


def algebra(basis: Basis) -> float:
    """Seconds a step: the basis is read four times, to orthogonalise twice."""
    return (4 * basis.vectors * basis.number + 6 * 4) * SHARD / HBM


def page() -> str:
    """The document, in Markdown."""
    return _TEXT.format(
        methods="\n".join(
            table(
                ["product", "computing", "network", "time", "in gradients", "collectives", ""],
                [_row(method) for method in METHODS],
            )
        ),
        memory="\n".join(
            table(
                ["", *(method.name for method in METHODS[1:])],
                [
                    [what, *(f"{memory(m, TWO_VECTORS)[what] / GB:.1f}" for m in METHODS[1:])]
                    for what in memory(EXACT, TWO_VECTORS)
                    if what != "basis"
                ],
            )
        ),
        bases="\n".join(
            table(
                ["basis", "alone", "a step's algebra", *(method.name for method in METHODS[1:])],
                [_of_basis(basis) for basis in BASES],
            )
        ),
    )


def _row(method: Method) -> list[str]:
    return [
        method.name,
        f"{method.compute:.0f} s",
        f"{method.network:.0f} s",
        f"{method.seconds:.0f} s",
        f"{method.seconds / GRADIENT_BF16.seconds:.1f}",
        method.collectives,
        method.note,
    ]


def _of_basis(basis: Basis) -> list[str]:
    totals = [sum(memory(method, basis).values()) for method in METHODS[1:]]
    return [
        basis.name,
        f"{basis.vectors * basis.number * SHARD / GB:.1f} GB",
        f"{1e3 * algebra(basis):.0f} ms",
        *(f"{t / GB:.0f} GB" + ("" if t <= MEMORY else ", too much") for t in totals),
    ]


_TEXT = """# A hundred billion parameters

What a Hessian of 10¹¹ parameters would cost on 64 GPUs of 80 GB: on paper, not measured. This page
is computed by `python -m torchlinop.bench.paper_model`; change an assumption there, and run it.

## What is assumed

- A transformer of 80 blocks of width 10,240, sharded by FSDP2 over all 64 GPUs, parameters in
  float32; one block is gathered while another one computes.
- Data of 2²⁰ tokens: 16,384 on every GPU, in as many microbatches as memory asks for. Each gathers
  all parameters anew.
- A gradient takes 6 operations per parameter and token, and 2 more as activations are computed
  again. A GPU reaches 40 % of 989 · 10¹² operations/s in bf16, and 67 % of 67 · 10¹² in float32.
- A GPU receives 50 GB/s in an all-gather over 8 nodes. Communication overlaps with computation:
  the slower one counts.
- A block has 17 activations per token and unit of width inside, and one at its input.
- Work in gradients as measured on small models: differences 2 gradients, forward over reverse 4,
  block by block 3.9. Parameters and tangents are gathered, block by block, as often as
  [counted on small models](benchmarks/scale/scale.md). Errors are those of small models, too.

## A product

Collectives are all-gathers + reduce-scatters, as many for any number of ranks. A Lanczos step has
two or three all-reduces of some numbers besides.

{methods}
Exact products keep the activations and their tangents of all blocks, as recomputing does not help
them: 512 tokens at once are what fits, and gathering the parameters for so few takes longer than
computing. Block by block they would take the time of their operations; and differences in float32,
the only ones that are accurate enough, take far longer than either, as no tensor core computes in
float32.

## Memory of a rank, in GB, without a basis

{memory}
## With a basis

A thick restart keeps `ncv` vectors; storing them in half precision halves them, and keeps the
extreme eigenvalues to 10⁻⁵ (`basis_dtype`).

{bases}
What does not fit can be kept in the memory of the hosts (`basis_device="cpu"`), at the speed of the
bus: four times 62.5 GB a step, for 20 vectors in half precision, are some 5 s at 50 GB/s, little
beside a product.

A run of 100 products takes {{hours}}.
"""
_TEXT = _TEXT.replace(
    "{{hours}}",
    ", ".join(f"{100 * method.seconds / 3600:.0f} hours ({method.name})" for method in METHODS[2:]),
)


if __name__ == "__main__":
    (Path(__file__).parents[2] / "docs" / "hundred_billion.md").write_text(page())
