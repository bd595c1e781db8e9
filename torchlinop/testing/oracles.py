"""Dense curvature matrices by routes that share no code with the operators they judge."""

from __future__ import annotations

import copy
import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

_Batches = Sequence[tuple[Any, Tensor]]

# Every outcome y of a random target, each with its probability for every loss term: pairs of
# shapes (N,) and the targets' own.
Outcomes = Iterable[tuple[Tensor, Tensor]]


def dense_hessian(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], *, rows_at_once: int = 1
) -> Tensor:
    """The Hessian (n, n) of ``loss()`` in the model's own parameters, by n backward passes.

    ``loss`` is evaluated once, on all data. Parameters are flattened row-major in the order given.
    ``rows_at_once`` passes are batched, which is faster on larger problems.
    """

    def gradient() -> Tensor:
        parts = torch.autograd.grad(loss(), parameters, create_graph=True, materialize_grads=True)
        return torch.cat([part.reshape(-1) for part in parts])

    return dense_jacobian(gradient, parameters, rows_at_once=rows_at_once)


def dense_jacobian(
    outputs: Callable[[], Tensor], parameters: Sequence[Tensor], *, rows_at_once: int = 1
) -> Tensor:
    """The Jacobian (m, n) of ``outputs()``, m numbers of any shape, by m backward passes."""
    with sdpa_kernel(SDPBackend.MATH):  # the one attention kernel with a second derivative
        values = outputs().reshape(-1)
    if not values.requires_grad:
        return values.new_zeros(len(values), sum(p.numel() for p in parameters))
    rows = []
    for units in torch.eye(len(values), dtype=values.dtype, device=values.device).split(
        rows_at_once
    ):
        parts = torch.autograd.grad(
            values,
            parameters,
            units if rows_at_once > 1 else units[0],
            retain_graph=True,
            materialize_grads=True,
            is_grads_batched=rows_at_once > 1,
        )
        rows.append(torch.cat([part.reshape(len(units), -1) for part in parts], dim=1))
    return torch.cat(rows).detach()


def dense_ggn(
    loss: Callable[[Tensor], Tensor],
    outputs: Callable[[], Tensor],
    parameters: Sequence[Tensor],
) -> Tensor:
    """``Jᵀ (∇² loss) J`` for a loss of the outputs of all data, by dense J and dense ``∇²``."""
    J = dense_jacobian(outputs, parameters)
    f = outputs().detach().requires_grad_()
    return J.T @ dense_hessian(lambda: loss(f), [f]) @ J


def dense_empirical_fisher(
    terms: Callable[[], Tensor], weights: Tensor | float, parameters: Sequence[Tensor]
) -> Tensor:
    """``Σ_n ω_n g_n g_nᵀ`` with g_n the gradient of ``terms()[n]``, N losses without weights."""
    G = dense_jacobian(terms, parameters)
    omega = torch.as_tensor(weights, dtype=G.dtype, device=G.device).expand(len(G))
    return G.T @ (omega[:, None] * G)


def dense_fisher(
    terms: Callable[[Tensor], Tensor],
    outcomes: Outcomes,
    weights: Tensor | float,
    parameters: Sequence[Tensor],
) -> Tensor:
    """``Σ_n ω_n E[g_n g_nᵀ]``, the expectation by summing over all outcomes of the targets.

    ``terms(targets)`` are the N negative log-likelihoods of targets.
    """
    matrices = [
        dense_empirical_fisher(functools.partial(terms, y), weights * p, parameters)
        for p, y in outcomes
    ]
    return torch.stack(matrices).sum(0)


def class_outcomes(logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Every class of a categorical target, for logits (N, C, ...); targets are (N, ...)."""
    P = logits.detach().softmax(dim=1)
    for c in range(P.shape[1]):
        yield P[:, c].flatten(), torch.full_like(P[:, c], c, dtype=torch.int64)


def bernoulli_outcomes(logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Every pattern of C independent bits, for logits (..., C)."""
    P = logits.detach().sigmoid()
    for bits in itertools.product((0.0, 1.0), repeat=P.shape[-1]):
        y = P.new_tensor(bits).expand_as(P)
        yield torch.where(y == 1, P, 1 - P).prod(-1).flatten(), y


def two_point_outcomes(mean: Tensor, std: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """C independent coin flips ``mean ± std``, for means (..., C).

    Their Fisher matrix is that of every distribution with this mean and this deviation, as long as
    the gradient of the loss is linear in the target: Gaussian and Poisson likelihoods.
    """
    mean, std = mean.detach(), std.detach()
    for signs in itertools.product((-1.0, 1.0), repeat=mean.shape[-1]):
        p = mean.new_full(mean.shape[:-1], 0.5 ** mean.shape[-1])
        yield p.flatten(), mean + mean.new_tensor(signs) * std


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


def curvlinops_hessian(model: nn.Module, loss: nn.Module, batches: _Batches) -> Tensor:
    """The dense Hessian by curvlinops 3.0.1, on a list of ``(inputs, targets)`` batches."""
    return _by_curvlinops("HessianLinearOperator", model, loss, batches)


def curvlinops_ggn(model: nn.Module, loss: nn.Module, batches: _Batches) -> Tensor:
    """The dense GGN by curvlinops 3.0.1."""
    return _by_curvlinops("GGNLinearOperator", model, loss, batches)


def curvlinops_empirical_fisher(model: nn.Module, loss: nn.Module, batches: _Batches) -> Tensor:
    """The dense empirical Fisher by curvlinops 3.0.1, which ignores what class weights do to it."""
    return _by_curvlinops("EFLinearOperator", model, loss, batches)


def curvlinops_fisher_mc(
    model: nn.Module,
    loss: nn.Module,
    batches: _Batches,
    *,
    mc_samples: int = 1,
    seed: int = 2147483647,
) -> Tensor:
    """The dense Monte Carlo Fisher by curvlinops 3.0.1.

    Its targets are drawn batch by batch from one generator: for cross-entropy
    ``softmax.multinomial(mc_samples, replacement=True)``.
    """
    return _by_curvlinops(
        "FisherMCLinearOperator", model, loss, batches, mc_samples=mc_samples, seed=seed
    )


def curvlinops_kfac(model: nn.Module, loss: nn.Module, batches: _Batches, **options: Any) -> Tensor:
    """The dense K-FAC matrix by curvlinops 3.0.1; its ``fisher_type`` is type-2 unless given."""
    options = {"fisher_type": "type-2", **options}
    return _by_curvlinops("KFACLinearOperator", model, loss, batches, **options)


def curvlinops_ekfac(
    model: nn.Module, loss: nn.Module, batches: _Batches, **options: Any
) -> Tensor:
    """The dense EKFAC matrix by curvlinops 3.0.1; its ``fisher_type`` is type-2 unless given."""
    options = {"fisher_type": "type-2", **options}
    return _by_curvlinops("EKFACLinearOperator", model, loss, batches, **options)


def _by_curvlinops(
    name: str, model: nn.Module, loss: nn.Module, batches: _Batches, **options: Any
) -> Tensor:
    """The named operator times the identity, on a copy of the model: K-FAC leaves hooks behind.

    The deterministic check is left out: it takes six passes, and the data are fixed.
    """
    model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports what torch has deprecated
        import curvlinops

        parameters = [p for p in model.parameters() if p.requires_grad]
        operator = getattr(curvlinops, name)(
            model, loss, parameters, batches, check_deterministic=False, **options
        )
        n = sum(p.numel() for p in parameters)
        dense: Tensor = operator @ torch.eye(n, dtype=parameters[0].dtype)
    return dense.detach()
