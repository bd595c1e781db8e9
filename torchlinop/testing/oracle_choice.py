"""An oracle, chosen: dense matrices of model, torch loss and batches, by formulas or curvlinops.

Both count alike: the loss is that of all data at once, parameters are flattened in the model's
order, and per-sample losses are summed over outputs before their mean is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchlinop.testing.dense_kfac import Metric, dense_kfac
from torchlinop.testing.model_problem import unreduced
from torchlinop.testing.oracles import (
    curvlinops_empirical_fisher,
    curvlinops_ggn,
    curvlinops_hessian,
    curvlinops_kfac,
    dense_empirical_fisher,
    dense_ggn,
    dense_hessian,
)

# (model, loss of torch.nn, batches of (inputs, targets)) -> the matrix (n, n)
Matrix = Callable[[nn.Module, nn.Module, Sequence[tuple[Tensor, Tensor]]], Tensor]


@dataclass(frozen=True)
class Oracle:
    """Four matrices of a model, each a function of (model, loss, batches)."""

    name: str
    hessian: Matrix
    ggn: Matrix
    empirical_fisher: Matrix
    kfac: Matrix  # type-2, expand, weights and biases apart; linear layers and convolutions


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _whole(batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    X, y = zip(*batches, strict=True)
    return torch.cat(X), torch.cat(y)


def _hessian(model: nn.Module, loss: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    X, y = _whole(batches)
    return dense_hessian(lambda: loss(model(X), y), _parameters(model))


def _ggn(model: nn.Module, loss: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    X, y = _whole(batches)
    return dense_ggn(lambda f: loss(f, y), lambda: model(X), _parameters(model))


def _empirical_fisher(
    model: nn.Module, loss: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    X, y = _whole(batches)
    weight = _share(loss, model(X), y)
    return dense_empirical_fisher(lambda: unreduced(loss, model(X), y), weight, _parameters(model))


def _kfac(model: nn.Module, loss: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    X, y = _whole(batches)
    return dense_kfac(model, list(X), _loss_hessian(loss, model(X).detach(), y))


def _loss_hessian(loss: nn.Module, outputs: Tensor, y: Tensor) -> Metric:
    share = _share(loss, outputs, y)

    def metric(f: Tensor, n: int) -> Tensor:
        f = f.clone().requires_grad_()
        one = outputs[n : n + 1].shape
        return dense_hessian(lambda: share * unreduced(loss, f.view(one), y[n : n + 1]).sum(), [f])

    return metric


def _share(loss: nn.Module, outputs: Tensor, y: Tensor) -> Tensor:
    """What the reduction multiplies the sum of all loss terms by: 1/N, 1/(N C), 1/Σw, or 1."""
    share: Tensor = (loss(outputs, y) / unreduced(loss, outputs, y).sum()).detach()
    return share


ORACLES = {
    "dense": Oracle("dense", _hessian, _ggn, _empirical_fisher, _kfac),
    "curvlinops": Oracle(
        "curvlinops",
        curvlinops_hessian,
        curvlinops_ggn,
        curvlinops_empirical_fisher,
        curvlinops_kfac,
    ),
}
