"""What is compared: the products of three matrices, by torchlinop and by its peers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import torchlinop
from torchlinop.bench.workloads import Workload

Product = Callable[[Tensor], Tensor]
Build = Callable[[Workload], Product]

HESSIAN, GGN, EF = "hessian", "ggn", "empirical-fisher"
BLOCKS = (8, 16)  # columns

UNIT = "gradient"
UNIT_MATH = "gradient, MATH attention"
OURS = "torchlinop, kept"
REBUILT = "torchlinop, rebuilt"
FORWARD = "torchlinop, forward over reverse"
SAMPLES = "torchlinop, loss_fn of samples, kept"
SAMPLES_REBUILT = "torchlinop, loss_fn of samples, rebuilt"
HE = "hessian-eigenthings"
CL = "curvlinops"


def block_of(k: int, name: str) -> str:
    """The name of a candidate that multiplies k columns at once."""
    return f"{name}, block of {k}"


@dataclass(frozen=True)
class Candidate:
    """Something that is timed: ``build(workload)`` gives a product of blocks (n, columns)."""

    build: Build
    columns: int = 1
    equals: str = OURS  # the candidate that multiplies by the same matrix


@dataclass(frozen=True)
class Matrix:
    """A matrix, its candidates, and the pairs of them of which the second should be faster."""

    title: str
    candidates: dict[str, Candidate]
    pairs: tuple[tuple[str, str], ...]


# Units


def gradient(w: Workload) -> Product:
    """The gradient of the loss, whatever the vector."""

    def product(V: Tensor) -> Tensor:
        gradients = torch.autograd.grad(w.loss(w.model, w.batch), w.parameters)
        return gradients[0]

    return product


def gradient_of_second_derivatives(w: Workload) -> Product:
    """The gradient by the kernels that Hessian products need."""
    plain = gradient(w)

    def product(V: Tensor) -> Tensor:
        with second_derivatives(w):
            return plain(V)

    return product


def second_derivatives(w: Workload) -> AbstractContextManager[Any]:
    """The one attention kernel that has second derivatives; torchlinop chooses it by itself."""
    return sdpa_kernel(SDPBackend.MATH) if w.attention else nullcontext()


UNITS = {UNIT: Candidate(gradient), UNIT_MATH: Candidate(gradient_of_second_derivatives)}


# Hessian


def hessian(**options: Any) -> Build:
    """Ours."""

    def build(w: Workload) -> Product:
        return torchlinop.HessianOperator(w.model, [w.batch], w.loss, **options).matmat

    return build


def hessian_by_eigenthings(w: Workload) -> Product:
    """hessian-eigenthings, reverse over reverse."""
    peer = importlib.import_module("hessian_eigenthings")
    return _eigenthings(w, peer.HessianOperator(w.model, [w.batch], w.loss))


def _eigenthings(w: Workload, operator: Any) -> Product:
    def product(V: Tensor) -> Tensor:
        with second_derivatives(w):
            Av: Tensor = operator.matvec(V[:, 0])
            return Av[:, None]

    return product


def by_curvlinops(name: str) -> Build:
    """The operator of that name, of any of the matrices."""

    def build(w: Workload) -> Product:
        peer = importlib.import_module("curvlinops")
        operator = getattr(peer, name)(
            w.model, nn.CrossEntropyLoss(), w.parameters, [w.batch], check_deterministic=False
        )

        def product(V: Tensor) -> Tensor:
            with second_derivatives(w):
                AV: Tensor = operator @ V if V.shape[1] > 1 else (operator @ V[:, 0])[:, None]
                return AV

        return product

    return build


# Gauss-Newton


def gauss_newton(**options: Any) -> Build:
    """Ours."""

    def build(w: Workload) -> Product:
        return torchlinop.GGNOperator(
            w.model, [w.batch], w.outputs, nn.CrossEntropyLoss(), **options
        ).matmat

    return build


def gauss_newton_by_eigenthings(w: Workload) -> Product:
    """hessian-eigenthings, by finite differences."""
    peer = importlib.import_module("hessian_eigenthings")
    return _eigenthings(w, peer.GGNOperator(w.model, [w.batch], w.outputs, w.loss_of_outputs))


# Empirical Fisher


def empirical_fisher(**options: Any) -> Build:
    """Terms are rows of the outputs: samples, or the tokens of a language model."""

    def build(w: Workload) -> Product:
        return torchlinop.EmpiricalFisherOperator(
            w.model, [w.batch], w.outputs, nn.CrossEntropyLoss(), **options
        ).matmat

    return build


def empirical_fisher_of_samples(**options: Any) -> Build:
    """Terms are samples, whatever ``loss_fn`` does with them: a sequence is one."""

    def build(w: Workload) -> Product:
        return torchlinop.EmpiricalFisherOperator(w.model, [w.samples], w.loss, **options).matmat

    return build


def empirical_fisher_by_eigenthings(w: Workload) -> Product:
    """hessian-eigenthings, whose terms are samples."""
    peer = importlib.import_module("hessian_eigenthings")

    def loss_of_sample(model: nn.Module, sample: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = sample
        return w.loss(model, (inputs[None], targets[None]))

    return _eigenthings(w, peer.EmpiricalFisherOperator(w.model, [w.samples], loss_of_sample))


# The three


def _compared(
    title: str,
    ours: Callable[..., Build],
    curvlinops: Build,
    others: dict[str, Candidate],
    pairs: tuple[tuple[str, str], ...],
) -> Matrix:
    """Ways of ours, other candidates, curvlinops, and blocks of 8 and 16."""
    kept = ours(linearization="keep")
    candidates = {
        OURS: Candidate(kept),
        REBUILT: Candidate(ours(linearization="rebuild")),
        FORWARD: Candidate(ours(method="forward_over_reverse")),
        **others,
        CL: Candidate(curvlinops),
    }
    for name, build in ((OURS, kept), (CL, curvlinops)):
        candidates |= {block_of(k, name): Candidate(build, columns=k) for k in BLOCKS}
    blocks = [(block_of(k, CL), block_of(k, OURS)) for k in BLOCKS]
    blocks += [(OURS, block_of(k, OURS)) for k in BLOCKS]
    return Matrix(title, candidates, (*pairs, (CL, OURS), (CL, REBUILT), *blocks))


MATRICES = {
    HESSIAN: _compared(
        "Hessian",
        hessian,
        by_curvlinops("HessianLinearOperator"),
        {HE: Candidate(hessian_by_eigenthings)},
        ((HE, OURS), (HE, REBUILT)),
    ),
    GGN: _compared(
        "Generalised Gauss-Newton matrix",
        gauss_newton,
        by_curvlinops("GGNLinearOperator"),
        {HE: Candidate(gauss_newton_by_eigenthings)},
        ((HE, OURS), (HE, REBUILT)),
    ),
    EF: _compared(
        "Empirical Fisher matrix",
        empirical_fisher,
        by_curvlinops("EFLinearOperator"),
        {
            SAMPLES: Candidate(empirical_fisher_of_samples(linearization="keep"), equals=SAMPLES),
            SAMPLES_REBUILT: Candidate(
                empirical_fisher_of_samples(linearization="rebuild"), equals=SAMPLES
            ),
            HE: Candidate(empirical_fisher_by_eigenthings, equals=SAMPLES),
        },
        ((HE, SAMPLES), (HE, SAMPLES_REBUILT), (HE, OURS)),
    ),
}
