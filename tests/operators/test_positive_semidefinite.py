"""Operators that are called positive semidefinite are, and combinations keep it where they may."""

import pytest
import torch
from torch import nn

from torchlinop import (
    CountingOperator,
    EKFACOperator,
    EmpiricalFisherOperator,
    FisherOperator,
    GGNOperator,
    GradientCovarianceOperator,
    GradientOuterOperator,
    HessianOperator,
    KFACOperator,
    MatrixOperator,
)
from torchlinop.algorithms.probes import real_part
from torchlinop.operators.blocks import BlockDiagonalOperator
from torchlinop.testing import gallery

LOSSES = [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)]
OF_OUTPUTS = [FisherOperator, GGNOperator, EmpiricalFisherOperator, GradientCovarianceOperator]
KRONECKER = [KFACOperator, EKFACOperator]


def forward(model, batch):
    return model(batch[0])


def built(kind, loss=LOSSES[0], **options):
    p = gallery.mlp()
    return kind(p.model, p.batches, forward, loss, **options)


def semidefinite():
    return built(GGNOperator)


def gradient_outer():
    p = gallery.mlp()
    return GradientOuterOperator(p.model, p.batches, p.loss_fn)


def unknown():
    p = gallery.mlp()
    return HessianOperator(p.model, p.batches, p.loss_fn)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", [*OF_OUTPUTS, *KRONECKER])
def test_curvatures_of_outputs_are_positive_semidefinite(kind, loss):
    op = built(kind, loss)
    eigenvalues = torch.linalg.eigvalsh(op.to_dense())
    assert op.positive_semidefinite
    assert eigenvalues[0] >= -1e-13 * eigenvalues[-1]


def test_an_outer_product_is_positive_semidefinite():
    assert gradient_outer().positive_semidefinite


@pytest.mark.parametrize(
    "op",
    [
        unknown,
        lambda: MatrixOperator(torch.eye(3)),
        lambda: built(GGNOperator, lambda outputs, batch: outputs.sin().sum()),
        lambda: built(GGNOperator, method="finite_difference"),
    ],
)
def test_of_others_it_is_not_known(op):
    assert not op().positive_semidefinite


@pytest.mark.parametrize(
    ("combined", "kept"),
    [
        (lambda A: 2 * A, True),
        (lambda A: A + A, True),
        (lambda A: A.shift(0.1), True),
        (lambda A: A.restrict(torch.arange(5)), True),
        (BlockDiagonalOperator.of, True),
        (CountingOperator, True),
        (real_part, True),
        (lambda A: -A, False),
        (lambda A: A - A, False),
        (lambda A: A.shift(-0.1), False),
        (lambda A: A + unknown(), False),
    ],
)
def test_combinations_keep_it_where_they_may(combined, kept):
    assert combined(semidefinite()).positive_semidefinite is kept
