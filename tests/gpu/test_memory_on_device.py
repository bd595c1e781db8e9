"""A thousand products leave the device's memory as it was; so do solvers, and failures."""

import gc

import pytest
import torch
from on_device import DEVICE, anywhere, moved, only_cuda

from torchlinop import (
    EmpiricalFisherOperator,
    GGNOperator,
    HessianOperator,
    KFACOperator,
    LambdaOperator,
    MatrixOperator,
    as_linear_operator,
    lanczos,
    lobpcg,
    slq,
    solve,
)
from torchlinop.losses.fused_cross_entropy import cross_entropy_map
from torchlinop.testing import gallery

pytestmark = [*anywhere, only_cuda]


def allocated():
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(DEVICE)


def of_outputs(operator, **options):
    def build():
        p = moved(gallery.mlp())
        return operator(p.model, p.batches, p.forward_fn, p.criterion, **options)

    return build


def hessian(**options):
    def build():
        p = moved(gallery.mlp())
        return HessianOperator(p.model, p.batches, p.loss_fn, **options)

    return build


OPERATORS = {
    "Hessian, kept": hessian(linearization="keep"),
    "Hessian, rebuilt": hessian(linearization="rebuild"),
    "Hessian, forward over reverse": hessian(method="forward_over_reverse"),
    "GGN, kept": of_outputs(GGNOperator, linearization="keep"),
    "GGN, rebuilt": of_outputs(GGNOperator, linearization="rebuild"),
    "empirical Fisher": of_outputs(EmpiricalFisherOperator),
    "K-FAC": of_outputs(KFACOperator),
    "matrix": lambda: MatrixOperator(torch.eye(50, device=DEVICE)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_a_thousand_products_leave_memory_as_it_was(name):
    A = OPERATORS[name]()
    v, V = A.space.random(1)[:, 0], A.space.random(4)
    for _ in range(3):
        A @ v
        A @ V
    before = allocated()
    for _ in range(500):
        A @ v
        A @ V
    assert allocated() == before


@pytest.mark.parametrize("name", ["Hessian, kept", "GGN, kept", "K-FAC"])
def test_operator_that_is_dropped_gives_its_memory_back(name):
    OPERATORS[name]()  # libraries keep what they need
    before = allocated()
    A = OPERATORS[name]()
    A @ A.space.random(2)
    assert allocated() > before
    del A
    assert allocated() == before


RUNS = {
    "lanczos": lambda op: lanczos(op, 3, tol=1e-6),
    "lobpcg": lambda op: lobpcg(op, 3),
    "slq": lambda op: slq(op, 4, 8),
    "solve": lambda op: solve(op, op.space.random(1)[:, 0], 1.0, method="cg"),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("ignore::torchlinop.TorchlinopWarning")
def test_solvers_leave_memory_as_it_was(name):
    op = MatrixOperator(torch.diag(torch.linspace(1, 9, 100, device=DEVICE).double()))
    RUNS[name](op)
    before = allocated()
    for _ in range(5):
        RUNS[name](op)
    assert allocated() == before


def test_products_through_the_host_leave_memory_as_it_was():
    A = as_linear_operator(MatrixOperator(torch.eye(1000, device=DEVICE)))
    x = torch.ones(1000).numpy()
    A @ x
    before = allocated()
    for _ in range(1000):
        A @ x
    assert allocated() == before


def test_failing_products_leave_memory_as_it_was():
    def fails(v):
        raise RuntimeError("no product")

    op = LambdaOperator(1000, fails, device=DEVICE)
    v = op.space.random(1)[:, 0]
    before = allocated()
    for _ in range(20):
        with pytest.raises(RuntimeError, match="no product"):
            op @ v
    assert allocated() == before


def test_cross_entropy_products_leave_memory_as_it_was():
    logits = torch.randn(64, 5000, device=DEVICE)
    product = cross_entropy_map(logits, torch.ones(64, device=DEVICE))
    u = torch.randn_like(logits)
    product(u)
    before = allocated()
    for _ in range(1000):
        product(u)
    assert allocated() == before
