"""The products of a run: counted, shown in two levels, in time, and named when memory runs out."""

import io
import sys

import pytest
import torch

from torchlinop import HessianOperator, LambdaOperator, MatrixOperator
from torchlinop.algorithms.products import Products, run_of_products
from torchlinop.errors import MemoryEstimateError, NonFiniteError, OptionError
from torchlinop.losses import supervised_loss

A = MatrixOperator(torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64))
EYE = torch.eye(2, dtype=torch.float64)


def test_products_are_those_of_the_damped_matrix_and_counted():
    products = Products(A, damping=0.5)
    assert torch.equal(products(EYE), A.matrix + 0.5 * EYE)
    assert torch.equal(products.columns(EYE), A.matrix + 0.5 * EYE)
    assert (products.matvecs, products.matmats) == (4, 2)


def test_a_product_of_a_bfloat16_operator_is_float32():
    products = Products(MatrixOperator(A.matrix.bfloat16()))
    assert products(torch.ones(2, 1)).dtype == torch.float32


def test_time_is_over_only_after_a_product():
    products = Products(A, max_seconds=1e-9)
    assert not products.late
    products(EYE)
    assert products.late


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": float("inf")}, "expected a finite damping"),
        ({"max_seconds": 0.0}, "expected max_seconds to be positive, got 0.0"),
    ],
)
def test_limits_that_make_no_sense_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        Products(A, **options)


def test_not_finite_numbers_are_refused_by_the_operators_name():
    products = Products(A)
    products(EYE)
    with pytest.raises(NonFiniteError, match=r"MatrixOperator.* hold NaN or infinity, by"):
        products.refuse_non_finite(torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
    ],
)
def test_running_out_of_memory_is_named(error):
    def product(v):
        raise error

    with (
        pytest.raises(MemoryEstimateError, match="memory on cpu ran out in product 1 of"),
        run_of_products(LambdaOperator(3, product)) as products,
    ):
        products(torch.ones(3, 1))


def test_other_errors_pass():
    def product(v):
        raise RuntimeError("of another kind")

    with (
        pytest.raises(RuntimeError, match="of another kind"),
        run_of_products(LambdaOperator(3, product)) as products,
    ):
        products(torch.ones(3, 1))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def product_over_two_batches(*, progress):
    data = [(torch.ones(2, 2), torch.zeros(2, 1)) for _ in range(2)]
    loss = supervised_loss(torch.nn.functional.mse_loss)
    op = HessianOperator(torch.nn.Linear(2, 1), data, loss)
    with run_of_products(op, total=1, progress=progress) as products:
        products(torch.ones(3, 1))


def test_products_and_batches_are_shown_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    product_over_two_batches(progress=True)
    assert "0/2 [00:00<?, ?batch/s]" in sys.stderr.getvalue()
    assert "1/1" in sys.stderr.getvalue()


def test_nothing_is_shown_unasked(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    product_over_two_batches(progress=False)
    assert not sys.stderr.getvalue()


def test_nothing_is_shown_without_a_terminal(capfd):
    product_over_two_batches(progress=True)
    assert capfd.readouterr() == ("", "")
