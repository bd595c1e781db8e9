"""The cross-entropy Hessian product: bytes it has to move, over the time, against a plain copy's.

The least that must be moved is a read of the logits and of the vector, and a write of the product.
The copy is of a tensor of the size of the logits: a read and a write.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchlinop.bench.peaks import free, peak_above
from torchlinop.bench.records import Record
from torchlinop.bench.stages import Setting, Stage, failure_of
from torchlinop.bench.tables import middle
from torchlinop.bench.timing import seconds
from torchlinop.losses import fused_cross_entropy
from torchlinop.losses.fused_cross_entropy import Backend, cross_entropy_hvp

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHAPES = {"4096 tokens, V=50,257": (4096, 50257), "1024 tokens, V=128,256": (1024, 128256)}
TINY = {"8 tokens, V=50": (8, 50)}
REPETITIONS = 9
CALLS = 5  # in a sample
ROWS_JUDGED = 64

BACKENDS: tuple[Backend, ...] = ("triton", "eager", "compile")
COPY = "copy"

Product = Callable[[Tensor], Tensor]


def stage(weight: float) -> Stage:
    """The one stage of this kind."""
    return Stage("cross-entropy", "bandwidth", weight, measured)


def measured(setting: Setting) -> Iterator[Record]:
    """A record for every shape, dtype and backend."""
    for title, shape in (TINY if setting.tiny else SHAPES).items():
        for name, dtype in DTYPES.items():
            free(setting.device)
            if setting.clock.spent:
                failure = "not measured: the time of this stage was spent"
                yield {"title": title, "dtype": name, "failure": failure}
                continue
            for found in _of(setting, shape, dtype):
                yield {"title": title, "dtype": name, **found}


def _of(setting: Setting, shape: tuple[int, int], dtype: torch.dtype) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    logits = (3 * torch.randn(shape, device=setting.device)).to(dtype)
    u, weights = torch.randn_like(logits), torch.full(shape[:1], 0.5, device=setting.device)
    target = torch.empty_like(logits)
    failures: dict[str, str] = {}
    products: dict[str, Product] = {}
    found: dict[str, dict[str, Any]] = {}
    for backend in BACKENDS:
        product = partial(cross_entropy_hvp, logits, weights, backend=backend)
        failures[backend] = _missing(backend, setting.device) or _failure(backend, product, u)
        if failures[backend]:
            continue
        with peak_above(setting.device) as peak:
            Hu = product(u)
            found[backend] = {"peak_bytes": peak(), "error": _error(Hu, logits, weights, u)}
        products[backend] = product
    samples = _samples(setting, {COPY: target.copy_, **products}, u)
    return [
        {"backend": backend, "failure": failures[backend]}
        if failures[backend]
        else {
            "backend": backend,
            **found[backend],
            **bandwidths(samples[backend], samples[COPY], logits.nbytes, weights.nbytes),
        }
        for backend in BACKENDS
    ]


def bandwidths(
    seconds_of_product: list[float], seconds_of_copy: list[float], size: int, of_weights: int
) -> dict[str, Any]:
    """Bytes a second of both, for logits of ``size`` bytes, and the fraction."""
    moved, copied = 3 * size + of_weights, 2 * size
    pairs = zip(seconds_of_product, seconds_of_copy, strict=True)
    return {
        "seconds": seconds_of_product,
        "copy_seconds": seconds_of_copy,
        "minimal_bytes": moved,
        "copy_bytes": copied,
        "bytes_per_second": moved / middle(seconds_of_product),
        "copy_bytes_per_second": copied / middle(seconds_of_copy),
        "fraction_of_copy": middle([moved / s / (copied / c) for s, c in pairs]),
    }


def _missing(backend: str, device: torch.device) -> str:
    if device.type == "cuda":
        return ""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    here = {"eager": True, "triton": interpreted, "compile": False}[backend]
    return "" if here else "not measured: needs a CUDA device"


def _failure(backend: str, product: Product, u: Tensor) -> str:
    """Why it does not work, or nothing. Compiles it."""
    try:
        product(u)
    except Exception as error:  # of compilers, whatever they raise
        return failure_of(error)
    return "does not compile here" if backend in fused_cross_entropy._failed else ""


def _error(Hu: Tensor, logits: Tensor, weights: Tensor, u: Tensor) -> float:
    """Relative to the largest entry of the formula in float64, on the first rows."""
    some = slice(ROWS_JUDGED)
    p, w, v = logits[some].double().softmax(-1), weights[some, None].double(), u[some].double()
    exact = w * (p * v - p * (p * v).sum(-1, keepdim=True))
    return float((Hu[some] - exact).abs().max() / exact.abs().max())


def _samples(setting: Setting, products: dict[str, Product], u: Tensor) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in products}
    for product in products.values():
        seconds(product, u, 2)
    for _ in setting.clock.repetitions(2 if setting.tiny else REPETITIONS, least=2):
        for name, product in products.items():
            samples[name].append(seconds(product, u, 1 if setting.tiny else CALLS))
    return samples
