"""Collectives, their bytes, and memory: of products and Lanczos steps on 1, 2 and 4 ranks."""

from __future__ import annotations

import datetime
import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import start_processes
from torch.nn.functional import cross_entropy

from torchlinop.algorithms.tridiagonal import lanczos_tridiagonal
from torchlinop.bench.collectives import Collectives
from torchlinop.bench.host_memory import host_peak
from torchlinop.bench.tables import table
from torchlinop.distributed import DDPHessianOperator, FSDPHessianOperator
from torchlinop.operators.base import CurvatureOperator

FORMAT = 1
WORLD_SIZES = (1, 2, 4)
UNITS = {
    "parameters": "n, of the whole model",
    "parameter_bytes": "B, held by a rank between products",
    "vector_bytes": "B, of one vector on a rank",
    "product, block, step": "collectives by kind: [how many, B altogether]; a step's are those "
    "besides its product; bytes are of the whole tensor that takes part",
    "gradient_peak, product_peak": "B, above what was held before; largest of the ranks",
}
WIDTH, DEPTH, CLASSES, BATCHES, SAMPLES = 128, 4, 10, 3, 32
COLUMNS = 4
_STEPS = (4, 8)

Build = Callable[[nn.Module, list[Any]], CurvatureOperator]


class Block(nn.Module):
    """Two layers and a way past them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.outer(torch.tanh(self.inner(x)))
        return out


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy."""
    return cross_entropy(model(batch[0]), batch[1])


def problem(rank: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """One model for all ranks, and batches of this rank."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(DEPTH)), nn.Linear(WIDTH, CLASSES))
    torch.manual_seed(1 + rank)
    labels = torch.randint(0, CLASSES, (BATCHES, SAMPLES))
    return model, list(zip(torch.randn(BATCHES, SAMPLES, WIDTH), labels, strict=True))


def _ddp(model: nn.Module, batches: list[Any]) -> CurvatureOperator:
    return DDPHessianOperator(model, batches, loss_fn, linearization="rebuild")


def _fsdp2(model: nn.Module, batches: list[Any]) -> CurvatureOperator:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return FSDPHessianOperator(model, batches, loss_fn, self_test=False)


SETUPS: dict[str, Build] = {"DDP": _ddp, "FSDP2": _fsdp2}


def measured(setup: str) -> dict[str, Any]:
    """What this rank sees; to be called by all ranks of the group."""
    model, batches = problem(dist.get_rank())
    op = SETUPS[setup](model, batches)
    v, V = op.space.random(1)[:, 0], op.space.random(COLUMNS)
    op @ v  # what is made at the first product only
    product = _counted(lambda: op @ v)
    few, many = (_counted(partial(lanczos_tridiagonal, op, v, steps)) for steps in _STEPS)
    between = _STEPS[1] - _STEPS[0]
    held = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    step = {
        kind: [(a - b) / between - c for a, b, c in zip(of, few[kind], product[kind], strict=True)]
        for kind, of in many.items()
    }
    return {
        "setup": setup,
        "world_size": dist.get_world_size(),
        "parameters": op.size,
        "parameter_bytes": sum(p.nbytes for p in held),
        "vector_bytes": v.nbytes,
        "product": product,
        "block": _counted(lambda: op @ V),
        "step": {kind: of for kind, of in step.items() if any(of)},
        "gradient_peak": host_peak(lambda: op.gradient()),  # type: ignore[attr-defined]
        "product_peak": host_peak(lambda: op @ v),
    }


def _counted(work: Callable[[], object]) -> dict[str, list[float]]:
    with Collectives() as collectives:
        work()
    kinds = ("all-reduce", "all-gather", "reduce-scatter", "broadcast")
    sizes = {kind: collectives.of_kind(kind) for kind in kinds}
    return {kind: [len(of), sum(of)] for kind, of in sizes.items()}


def run(out: Path, world_sizes: Sequence[int] = WORLD_SIZES) -> None:
    """Start ranks (gloo), measure, and write ``scale.json`` and ``scale.md``."""
    records = [record for size in world_sizes for record in _on_ranks(size)]
    facts = {"format": FORMAT, "torch": torch.__version__, "units": UNITS, "records": records}
    out.mkdir(parents=True, exist_ok=True)
    (out / "scale.json").write_text(json.dumps(facts, indent=1) + "\n")
    (out / "scale.md").write_text(report(records, torch.__version__))


def _on_ranks(world_size: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_rank, (world_size, folder), world_size, start_method="spawn")
        records: list[dict[str, Any]] = json.loads((Path(folder) / "records").read_text())
    return records


def _rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=300),
    )
    of_ranks: list[Any] = [None] * world_size
    dist.all_gather_object(of_ranks, [measured(setup) for setup in SETUPS])
    if rank == 0:
        records = [_worst(of_setup) for of_setup in zip(*of_ranks, strict=True)]
        (Path(folder) / "records").write_text(json.dumps(records))
    dist.destroy_process_group()


def _worst(of_ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Memory of the rank that needs most; all count the same collectives."""
    sizes = {key for key in of_ranks[0] if key.endswith(("_bytes", "_peak"))}
    return of_ranks[0] | {key: max(record[key] for record in of_ranks) for key in sizes}


def report(records: Sequence[dict[str, Any]], version: str) -> str:
    """Tables in Markdown."""
    n = records[0]["parameters"]
    return "\n".join([
        "# What crosses ranks",
        "",
        f"Counted, not timed, by `python -m torchlinop.bench scale` (torch {version}, gloo, CPU): "
        f"a Hessian of {n:,} parameters in float32 ({4 * n:,} bytes), {DEPTH} blocks and a head, "
        f"{BATCHES} batches of {SAMPLES} samples on every rank. Bytes are those of the whole tensor"
        " that takes part: what is reduced, or what is gathered or scattered altogether. A step's "
        "collectives are those besides its product, whatever the size of the basis.",
        "",
        *table(
            ["ranks", "setup", "a product", f"a block of {COLUMNS}", "a Lanczos step besides"],
            [
                [
                    str(record["world_size"]),
                    record["setup"],
                    *(_written(record[what]) for what in ("product", "block", "step")),
                ]
                for record in records
            ],
        ),
        "Memory of a rank, in thousands of bytes; peaks are above what is held between products.",
        "",
        *table(
            ["ranks", "setup", "parameters", "a vector", "peak of a gradient", "of a product"],
            [
                [
                    str(record["world_size"]),
                    record["setup"],
                    *(f"{record[key] / 1e3:,.0f}" for key in _MEMORY),
                ]
                for record in records
            ],
        ),
    ])  # fmt: skip


_MEMORY = ("parameter_bytes", "vector_bytes", "gradient_peak", "product_peak")


def _written(counts: dict[str, list[float]]) -> str:
    parts = [f"{n:g} {kind}, {size:,.0f} B" for kind, (n, size) in counts.items() if n]
    return "; ".join(parts) or "nothing"
