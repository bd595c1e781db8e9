"""What a user writes, checked against the annotations of the installed package."""

from typing import assert_type

import torch
from scipy.sparse.linalg import eigsh

from torchlinop import (
    EigenResult,
    GGNOperator,
    HessianOperator,
    as_linear_operator,
    lanczos,
    match_names,
    options,
    spectral_density,
    trace,
)
from torchlinop.callbacks import CurvatureWatch, TopEigenvalues, Trace
from torchlinop.errors import TorchlinopError

Batch = tuple[torch.Tensor, torch.Tensor]


def loss_fn(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    inputs, targets = batch
    return torch.nn.functional.cross_entropy(model(inputs), targets)


def forward_fn(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    outputs: torch.Tensor = model(batch[0])
    return outputs


model = torch.nn.Linear(4, 3)
data: list[Batch] = [(torch.randn(8, 4), torch.randint(0, 3, (8,)))]

H = HessianOperator(model, data, loss_fn, mode="eval", param_filter=match_names("weight"))
G = GGNOperator(model, data, forward_fn, torch.nn.CrossEntropyLoss(), microbatch_size=4)
assert_type(H @ torch.ones(H.size), torch.Tensor)
assert_type(H.shape, tuple[int, int])
eigsh(as_linear_operator(H + 0.5 * H.shift(1.0)), k=2)

with options(progress=False):
    found = lanczos(H, k=2, which="LA", v0=None)
assert_type(found, EigenResult)
assert_type(found.eigenvalues, torch.Tensor)
assert_type(found.scalars(), dict[str, float])
assert_type(trace(G, 20, method="hutch++").estimate, float)
assert_type(spectral_density(G, num_runs=2, seed=1).density, torch.Tensor)
assert_type(EigenResult.load("result.safetensors"), EigenResult)

watch = CurvatureWatch(lambda model: HessianOperator(model, data, loss_fn), every=10)
watch = CurvatureWatch(lambda model: G, [TopEigenvalues(k=1), Trace(20)], every=10)
assert_type(watch(0, model), dict[str, float])

try:
    lanczos(H, which="largest")  # type: ignore[arg-type]
    lanczos(H, "3")  # type: ignore[arg-type]
    HessianOperator(model, data, loss_fn, mode="test")  # type: ignore[arg-type]
    trace(H).eigenvalues  # type: ignore[attr-defined]  # noqa: B018
except (TorchlinopError, TypeError, AttributeError):
    pass
