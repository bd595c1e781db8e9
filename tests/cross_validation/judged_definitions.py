"""Every matrix of a problem by its definition, dense, by code that the operators do not share."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator

import torch
from judged_losses import LOSSES, N, problem
from torch import Tensor

from torchlinop import counter_random
from torchlinop.losses.recognition import loss_of_output
from torchlinop.testing.dense_kfac import LayerFactors, layer_factors
from torchlinop.testing.gallery import unreduced
from torchlinop.testing.oracles import (
    dense_empirical_fisher,
    dense_fisher,
    dense_ggn,
    dense_hessian,
    dense_jacobian,
)

DRAWS, SEED = 2, 5  # of the Monte Carlo matrices


@functools.cache
def hessian(loss: str, reduction: str) -> Tensor:
    p = problem(loss, reduction)
    return dense_hessian(p.full_loss, p.parameters)


@functools.cache
def ggn(loss: str, reduction: str) -> Tensor:
    p = problem(loss, reduction)
    return dense_ggn(p.loss_of_outputs, p.outputs, p.parameters)


@functools.cache
def term_weight(loss: str, reduction: str) -> float:
    """ω: 1 in a sum, and in a mean what torch divides by."""
    p = problem(loss, reduction)
    total = copy.copy(p.criterion)
    total.reduction = "sum"
    f = p.outputs().detach()
    return float(p.loss_of_outputs(f) / total(f, *p.full_batch[1:]))


@functools.cache
def fisher(loss: str, reduction: str) -> Tensor:
    p = problem(loss, reduction)
    targets = p.full_batch[1:]
    return dense_fisher(
        lambda drawn: LOSSES[loss].terms(p.outputs(), drawn, targets),
        LOSSES[loss].outcomes(p.outputs(), *targets),
        term_weight(loss, reduction),
        p.parameters,
    )


@functools.cache
def empirical_fisher(loss: str, reduction: str) -> Tensor:
    p = problem(loss, reduction)
    return dense_empirical_fisher(
        lambda: unreduced(p.criterion, p.outputs(), *p.full_batch[1:]),
        term_weight(loss, reduction),
        p.parameters,
    )


def gradient(loss: str, reduction: str) -> Tensor:
    p = problem(loss, reduction)
    return torch.cat([g.flatten() for g in torch.autograd.grad(p.full_loss(), p.parameters)])


def gradient_outer(loss: str, reduction: str) -> Tensor:
    g = gradient(loss, reduction)
    return torch.outer(g, g)


def gradient_covariance(loss: str, reduction: str) -> Tensor:
    """Σ ω (g_n − ḡ)(g_n − ḡ)ᵀ over the terms, of those that are left out too: they count 0."""
    p = problem(loss, reduction)
    G = dense_jacobian(lambda: unreduced(p.criterion, p.outputs(), *p.full_batch[1:]), p.parameters)
    omega = term_weight(loss, reduction)
    if "ignored" in loss:
        G = G[p.full_batch[1] >= 0]
    centred = G - G.mean(0)
    return omega * centred.T @ centred


def jacobian(loss: str, reduction: str) -> Tensor:
    p = problem(loss, reduction)
    return dense_jacobian(p.outputs, p.parameters)


def in_blocks(matrix: Tensor, loss: str) -> Tensor:
    """Its diagonal blocks, one a parameter."""
    sizes = [q.numel() for q in problem(loss, "mean").parameters]
    mask = torch.block_diag(*(torch.ones(m, m, dtype=matrix.dtype) for m in sizes))
    return mask * matrix


def ggn_blocks(loss: str, reduction: str) -> Tensor:
    return in_blocks(ggn(loss, reduction), loss)


def ggn_diagonal(loss: str, reduction: str) -> Tensor:
    return ggn(loss, reduction).diagonal().diag()


# What stands between the Jacobians of a sample's outputs, M_n (N, O, O), by kind.


def _of_samples(M: Tensor) -> Tensor:
    """The diagonal blocks (N, O, O) of a matrix over all outputs."""
    blocks = M.reshape(N, len(M) // N, N, len(M) // N)
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)


def loss_hessians(loss: str, reduction: str) -> Tensor:
    p = problem(loss, reduction)
    f = p.outputs().detach().requires_grad_()
    return _of_samples(dense_hessian(lambda: p.loss_of_outputs(f), [f]))


def term_outer_products(loss: str, reduction: str) -> Tensor:
    p = problem(loss, reduction)
    f = p.outputs().detach().requires_grad_()
    G = dense_jacobian(lambda: unreduced(p.criterion, f, *p.full_batch[1:]), [f])
    return _of_samples(term_weight(loss, reduction) * G.T @ G)


def drawn_outer_products(loss: str, reduction: str) -> Tensor:
    """Of the targets that are drawn; the draws themselves are the library's."""
    p = problem(loss, reduction)
    f = p.outputs().detach()
    own = loss_of_output(p.criterion)
    total = torch.zeros(N, f[0].numel(), f[0].numel(), dtype=f.dtype)
    for m in range(DRAWS):
        draw = functools.partial(
            counter_random.uniform, seed=SEED, stream=m, first=0, device=torch.device("cpu")
        )
        terms = own.sampled(f, p.full_batch, draw)
        G = terms.gradients * (terms.weights / DRAWS).sqrt()
        positions = torch.eye(G.shape[2]) if G.ndim == 3 else [torch.ones(())]  # a term each
        for position in positions:
            g = (G * position).flatten(1)
            total += g[:, :, None] * g[:, None, :]
    return total


METRICS = {
    "type-2": loss_hessians,
    "empirical": term_outer_products,
    "mc": drawn_outer_products,
    "forward-only": loss_hessians,  # which does not ask for it
}
metric = functools.cache(lambda kind, loss, reduction: METRICS[kind](loss, reduction))


@functools.cache
def of_metric(kind: str, loss: str, reduction: str) -> Tensor:
    """Σ_n J_nᵀ M_n J_n."""
    J = jacobian(loss, reduction).unflatten(0, (N, -1))
    return torch.einsum("noi,nop,npj->ij", J, metric(kind, loss, reduction), J)


def monte_carlo_fisher(loss: str, reduction: str) -> Tensor:
    return of_metric("mc", loss, reduction)


@functools.cache
def factors(
    kind: str, loss: str, reduction: str, reduce: bool, joint: bool
) -> tuple[LayerFactors, ...]:
    """A and B of every layer with parameters, by loops over samples and positions."""
    p = problem(loss, reduction)
    M = metric(kind, loss, reduction)
    layers = [m for m in p.model.modules() if list(m.parameters(recurse=False))]
    samples = list(p.full_batch[0])
    return tuple(
        layer_factors(p.model, m, samples, lambda f, n: M[n], reduce=reduce, joint=joint)
        for m in layers
    )


def kronecker_blocks(
    kind: str, loss: str, reduction: str, *, reduce: bool, joint: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The rows of a block, and its B and A: of weight and bias jointly, or of each."""
    start = 0
    for f in factors(kind, loss, reduction, reduce, joint):
        d_out, d_in = len(f.B), len(f.A) - joint
        B = torch.eye(d_out).double() if kind == "forward-only" else f.B
        W = torch.arange(start, start + d_out * d_in).view(d_out, d_in)
        b = torch.arange(start + d_out * d_in, start + d_out * (d_in + 1))
        if joint:
            yield torch.cat([W, b[:, None]], 1).flatten(), B, f.A
        else:
            yield W.flatten(), B, f.A
            yield b, B, torch.ones(1, 1).double()
        start = int(b[-1]) + 1


def kfac(kind: str, loss: str, reduction: str, *, reduce: bool, joint: bool) -> Tensor:
    """B ⊗ A for every block."""
    K = torch.zeros_like(ggn(loss, reduction))
    for rows, B, A in kronecker_blocks(kind, loss, reduction, reduce=reduce, joint=joint):
        K[rows[:, None], rows] = torch.kron(B, A)
    return K


def ekfac(kind: str, loss: str, reduction: str, *, reduce: bool, joint: bool) -> Tensor:
    """Σ λ P_B ⊗ P_A over eigenspaces of B and A, λ the mean of the exact matrix on each."""
    E = torch.zeros_like(ggn(loss, reduction))
    G = of_metric(kind, loss, reduction)
    for rows, B, A in kronecker_blocks(kind, loss, reduction, reduce=reduce, joint=joint):
        exact = G[rows[:, None], rows]
        for P_B, P_A in itertools.product(eigenspaces(B), eigenspaces(A)):
            P = torch.kron(P_B, P_A)
            E[rows[:, None], rows] += (exact * P).sum() / P.trace() * P
    return E


def eigenspaces(F: Tensor) -> list[Tensor]:
    """The orthogonal projections (d, d) on its eigenspaces, which no choice of vectors changes."""
    values, vectors = torch.linalg.eigh(F)
    starts = (values.diff() > 1e-11 * values.abs().max()).nonzero().flatten() + 1
    groups = torch.tensor_split(vectors, starts, dim=1)
    return [Q @ Q.T for Q in groups]
