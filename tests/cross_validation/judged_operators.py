"""Every operator under every loss, reduction, batching and dtype: who builds it, what it is."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import judged_definitions as definitions
import torch
from judged_losses import LOSSES, REDUCTIONS, problem
from torch import Tensor, nn

import torchlinop as tl
from torchlinop.losses import supervised_loss
from torchlinop.testing import oracles
from torchlinop.testing.gallery import Problem

# Of rounding alone, relative to the largest entry.
EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}
# Central differences: truncation and rounding balance at u^(2/3), 4e-11 and 2e-5, times the ratio
# of third to second derivatives, about 10 to 100 here.
DIFFERENCES = {torch.float64: 1e-8, torch.float32: 2e-3}

DTYPES = {"float64": torch.float64, "float32": torch.float32}
BATCHINGS: dict[str, Callable[[Problem], tuple[list[Any], dict[str, Any]]]] = {
    "one": lambda p: ([p.full_batch], {}),
    "ragged": lambda p: (p.batches, {}),
    "micro": lambda p: ([p.full_batch], {"microbatch_size": 2}),
}


@dataclass(frozen=True)
class Cell:
    """What is asked of an operator under a loss."""

    reduction: str
    batching: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.reduction} {self.batching} {self.dtype}"


CELLS = [Cell(*c) for c in itertools.product(REDUCTIONS, BATCHINGS, DTYPES)]
# curvlinops has no microbatches.
THEIR_CELLS = [cell for cell in CELLS if cell.batching != "micro"]


@dataclass(frozen=True)
class Judged:
    """An operator of ours, its definition, and the same of curvlinops."""

    build: Callable[..., Any]  # (problem, batches, **options) -> operator
    definition: Callable[[str, str], Tensor]  # (loss, reduction) -> dense
    theirs: Callable[[nn.Module, nn.Module, Sequence[Any]], Tensor] | None = None
    tolerance: dict[torch.dtype, float] = field(default_factory=lambda: EXACT)
    losses: tuple[str, ...] = tuple(LOSSES)


LIKELIHOODS = tuple(name for name, loss in LOSSES.items() if loss.outcomes)


def of_outputs(operator: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    return lambda p, batches, **options: operator(
        p.model, batches, p.forward_fn, p.criterion, **fixed, **options
    )


def of_loss(operator: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    return lambda p, batches, **options: operator(
        p.model, batches, supervised_loss(p.criterion), **fixed, **options
    )


def in_blocks(p: Problem, batches: Sequence[Any], **options: Any) -> Any:
    G = tl.GGNOperator(p.model, batches, p.forward_fn, p.criterion, **options)
    return tl.BlockDiagonalOperator.of(G)


def jacobian(p: Problem, batches: Sequence[Any], **options: Any) -> Any:
    return tl.JacobianOperator(p.model, batches, p.forward_fn, **options)


DRAWN = {"mc_samples": definitions.DRAWS, "sampling_seed": definitions.SEED}
OPERATORS: dict[str, Judged] = {
    "Hessian": Judged(of_loss(tl.HessianOperator), definitions.hessian, oracles.curvlinops_hessian),
    "Hessian, forward over reverse": Judged(
        of_loss(tl.HessianOperator, method="forward_over_reverse"), definitions.hessian
    ),
    "Hessian, finite differences": Judged(
        of_loss(tl.HessianOperator, method="finite_difference"),
        definitions.hessian,
        tolerance=DIFFERENCES,
    ),
    "GGN": Judged(of_outputs(tl.GGNOperator), definitions.ggn, oracles.curvlinops_ggn),
    "GGN, forward over reverse": Judged(
        of_outputs(tl.GGNOperator, method="forward_over_reverse"), definitions.ggn
    ),
    "GGN, loss by autograd": Judged(
        of_outputs(tl.GGNOperator, loss_hvp="autograd"), definitions.ggn
    ),
    "Fisher": Judged(of_outputs(tl.FisherOperator), definitions.fisher, losses=LIKELIHOODS),
    "Monte Carlo Fisher": Judged(
        of_outputs(tl.FisherOperator, **DRAWN), definitions.monte_carlo_fisher, losses=LIKELIHOODS
    ),
    "empirical Fisher": Judged(
        of_outputs(tl.EmpiricalFisherOperator),
        definitions.empirical_fisher,
        oracles.curvlinops_empirical_fisher,
    ),
    "gradient outer product": Judged(of_loss(tl.GradientOuterOperator), definitions.gradient_outer),
    "gradient covariance": Judged(
        of_outputs(tl.GradientCovarianceOperator), definitions.gradient_covariance
    ),
    "blocks of the GGN": Judged(in_blocks, definitions.ggn_blocks),
    "diagonal of the GGN": Judged(of_outputs(tl.ggn_diagonal), definitions.ggn_diagonal),
    "Jacobian": Judged(jacobian, definitions.jacobian),
}


def kronecker_family() -> Iterator[tuple[str, Judged]]:
    """K-FAC and EKFAC in all their modes."""
    for kind, reduce, joint in itertools.product(definitions.METRICS, (False, True), (False, True)):
        approximation = "reduce" if reduce else "expand"
        common = {"fisher_type": kind, "separate_weight_and_bias": not joint}
        drawn = DRAWN if kind == "mc" else {}
        for name, operator, definition, reference in (
            ("K-FAC", tl.KFACOperator, definitions.kfac, oracles.curvlinops_kfac),
            ("EKFAC", tl.EKFACOperator, definitions.ekfac, oracles.curvlinops_ekfac),
        ):
            if name == "EKFAC" and kind == "forward-only":  # it has no gradients to correct with
                continue
            theirs = functools.partial(reference, kfac_approx=approximation, **common)
            mode = f"{kind}, {approximation}, {'joint' if joint else 'separate'}"
            yield (
                f"{name}, {mode}",
                Judged(
                    of_outputs(operator, approximation=approximation, **common, **drawn),
                    functools.partial(definition, kind, reduce=reduce, joint=joint),
                    None if kind == "mc" else theirs,  # whose draws are others
                    losses=LIKELIHOODS if kind == "mc" else tuple(LOSSES),
                ),
            )


OPERATORS.update(kronecker_family())

ROWS = [(name, loss) for name, judged in OPERATORS.items() for loss in judged.losses]


def error_of_ours(name: str, loss: str, cell: Cell) -> float:
    """‖ours − definition‖ / ‖definition‖ in the largest entry; of a float32 model, in float64."""
    judged, p = OPERATORS[name], problem(loss, cell.reduction, DTYPES[cell.dtype])
    batches, options = BATCHINGS[cell.batching](p)
    ours = judged.build(p, batches, **options).to_dense()
    return relative(ours.double(), truth(name, loss, cell.reduction))


def error_of_theirs(name: str, loss: str, cell: Cell) -> float | str:
    """The same of curvlinops, or the name of the exception that it raises."""
    p = problem(loss, cell.reduction, DTYPES[cell.dtype])
    batches, _ = BATCHINGS[cell.batching](p)
    theirs = OPERATORS[name].theirs
    assert theirs
    try:
        matrix = theirs(p.model, p.criterion, batches)
    except Exception as refusal:  # whatever it is
        return type(refusal).__name__
    return relative(matrix.double(), truth(name, loss, cell.reduction))


@functools.cache
def truth(name: str, loss: str, reduction: str) -> Tensor:
    return OPERATORS[name].definition(loss, reduction)


def relative(A: Tensor, reference: Tensor) -> float:
    assert A.shape == reference.shape
    return float((A - reference).abs().max() / reference.abs().max())
