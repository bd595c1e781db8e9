"""Dense Hessians by routes that share no code with the operators they judge."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def dense_hessian(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], *, rows_at_once: int = 1
) -> Tensor:
    """The Hessian (n, n) of ``loss()`` in the model's own parameters, by n backward passes.

    ``loss`` is evaluated once, on all data. Parameters are flattened row-major in the order given.
    ``rows_at_once`` passes are batched, which is faster on larger problems.
    """
    with sdpa_kernel(SDPBackend.MATH):  # the one attention kernel with a second derivative
        value = loss()
    gradients = torch.autograd.grad(value, parameters, create_graph=True, materialize_grads=True)
    gradient = torch.cat([g.reshape(-1) for g in gradients])
    n = len(gradient)
    if not gradient.requires_grad:
        return gradient.new_zeros(n, n)
    rows = []
    for units in torch.eye(n, dtype=gradient.dtype).split(rows_at_once):
        parts = torch.autograd.grad(
            gradient,
            parameters,
            units if rows_at_once > 1 else units[0],
            retain_graph=True,
            materialize_grads=True,
            is_grads_batched=rows_at_once > 1,
        )
        rows.append(torch.cat([part.reshape(len(units), -1) for part in parts], dim=1))
    return torch.cat(rows).detach()


def least_squares_hessian(X: Tensor, outputs: int) -> Tensor:
    """Closed form for ``mean((X Wᵀ + b − Y)²)`` over N × C entries, in (vec W, b) row-major.

    ``(2 / NC) I_C ⊗ X̄ᵀX̄`` with X̄ = [X, 1], its rows and columns put in the order (W, b).
    """
    N, inputs = X.shape
    augmented = torch.cat([X, X.new_ones(N, 1)], dim=1)
    blocks = torch.kron(torch.eye(outputs, dtype=X.dtype), augmented.T @ augmented)
    order = torch.arange(outputs * (inputs + 1)).view(outputs, inputs + 1)
    order = torch.cat([order[:, :-1].reshape(-1), order[:, -1]])
    return 2 / (N * outputs) * blocks[order][:, order]


def softmax_regression_hessian(X: Tensor, W: Tensor) -> Tensor:
    """Closed form for the mean cross-entropy of logits ``X Wᵀ``: (1/N) Σ (diag p − p pᵀ) ⊗ x xᵀ."""
    P = (X @ W.T).softmax(dim=1)
    loss_hessians = torch.diag_embed(P) - P[:, :, None] * P[:, None, :]
    H = torch.einsum("nij,nk,nl->ikjl", loss_hessians, X, X) / len(X)
    return H.reshape(W.numel(), W.numel())


def curvlinops_hessian(
    model: nn.Module,
    loss: nn.Module,
    batches: Sequence[tuple[Any, Tensor]],
) -> Tensor:
    """The dense Hessian by curvlinops 3.0.1, on a list of ``(inputs, targets)`` batches.

    Its deterministic check is left out: it takes six passes, and the data are fixed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports what torch has deprecated
        from curvlinops import HessianLinearOperator

        parameters = [p for p in model.parameters() if p.requires_grad]
        operator = HessianLinearOperator(
            model, loss, parameters, batches, check_deterministic=False
        )
        n = sum(p.numel() for p in parameters)
        dense: Tensor = operator @ torch.eye(n, dtype=parameters[0].dtype)
    return dense
