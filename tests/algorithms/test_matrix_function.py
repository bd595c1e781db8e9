"""f(A) b is that of the eigendecomposition, with an error not larger than claimed."""

import pytest
import torch

from torchlinop import LambdaOperator, MatrixOperator
from torchlinop.algorithms.matrix_function import apply_function
from torchlinop.errors import NonFiniteError, NotConvergedWarning, OptionError, VectorError
from torchlinop.testing.gallery import with_spectrum

F64 = torch.float64
unconverged = pytest.mark.filterwarnings("ignore:.*columns not converged")
FUNCTIONS = {"exp": torch.exp, "sqrt": torch.sqrt, "log": torch.log, "1/x": torch.reciprocal}


def problem(eigenvalues, f, columns=3):
    A, Q = with_spectrum(eigenvalues)
    torch.manual_seed(1)
    B = torch.randn(len(eigenvalues), columns, dtype=F64)
    return A, B, Q @ (f(eigenvalues)[:, None] * (Q.T @ B))


@pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (torch.float32, 1e-5)])
def test_functions_equal_those_of_the_dense_matrix(f, dtype, tolerance):
    A, B, exact = problem(torch.linspace(0.3, 3, 200, dtype=F64), f)
    result = apply_function(MatrixOperator(A.to(dtype)), f, B.to(dtype), rtol=tolerance / 2)
    errors = (result.x - exact).norm(dim=0)
    assert result.converged.all()
    assert (errors <= tolerance * exact.norm(dim=0)).all()


@unconverged
@pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("steps", [5, 10, 20, 40])
def test_the_estimated_error_is_not_less_than_the_true_one(f, steps):
    A, B, exact = problem(torch.linspace(0.1, 3, 200, dtype=F64), f)
    result = apply_function(MatrixOperator(A), f, B, steps, rtol=0.0)
    assert ((result.x - exact).norm(dim=0) <= 1.5 * result.error_estimates).all()


def test_a_second_pass_gives_the_same_without_a_basis():
    A, B, _ = problem(torch.linspace(-1, 1, 50, dtype=F64), torch.exp)
    kept = apply_function(MatrixOperator(A), torch.exp, B)
    again = apply_function(MatrixOperator(A), torch.exp, B, keep_basis=False)
    torch.testing.assert_close(again.x, kept.x, rtol=1e-14, atol=1e-14)
    assert again.matvecs == 2 * kept.matvecs


def test_a_vector_gives_a_vector_and_zero_gives_zero():
    op = MatrixOperator(2 * torch.eye(6, dtype=F64))
    b = torch.arange(6, dtype=F64)
    torch.testing.assert_close(
        apply_function(op, torch.log, b).x, b * 2**0.0 * torch.log(torch.tensor(2.0, dtype=F64))
    )
    assert not apply_function(op, torch.exp, torch.zeros(6, dtype=F64)).x.any()


def test_the_root_of_a_projection_is_itself():
    eigenvalues = torch.tensor([0.0, 1.0], dtype=F64).repeat_interleave(20)
    A, B, exact = problem(eigenvalues, torch.sqrt)
    with pytest.warns(NotConvergedWarning, match="rounding forbids more. Raise rtol"):
        result = apply_function(MatrixOperator(A), torch.sqrt, B)
    assert result.steps == 5  # the first look after its Krylov space of two is exhausted
    torch.testing.assert_close(result.x, exact, rtol=1e-7, atol=1e-7)


def test_half_precision_products_keep_their_vectors_in_float32():
    A, B, exact = problem(torch.linspace(0.5, 2, 100, dtype=F64), torch.sqrt)
    result = apply_function(MatrixOperator(A.bfloat16()), torch.sqrt, B.bfloat16())
    assert result.x.dtype == torch.float32
    assert ((result.x - exact).norm(dim=0) <= 0.03 * exact.norm(dim=0)).all()


STRESS = {
    "rank 5": torch.cat([torch.zeros(95, dtype=F64), torch.arange(1, 6, dtype=F64)]),
    "two values": torch.tensor([1.0, 50.0], dtype=F64).repeat_interleave(50),
    "outliers": torch.cat([torch.linspace(0.01, 0.5, 90), torch.linspace(2, 20, 10)]).double(),
    "condition 1e6": torch.logspace(-6, 0, 100, dtype=F64),
    "tiny": 1e-12 * torch.linspace(0.1, 1, 100, dtype=F64),
    "identity": torch.ones(100, dtype=F64),
}  # fmt: skip


@unconverged
@pytest.mark.parametrize("spectrum", STRESS)
@pytest.mark.parametrize("f", [torch.exp, torch.sqrt, torch.sign, torch.abs])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_what_is_converged_is_right_and_errors_are_not_larger_than_estimated(spectrum, f, dtype):
    A, B, exact = problem(STRESS[spectrum], f)
    result = apply_function(MatrixOperator(A.to(dtype)), f, B.to(dtype), 60)
    errors = (result.x.double() - exact).norm(dim=0)
    norm_of_A = float(STRESS[spectrum].abs().max())
    kernel = f(torch.tensor(50 * torch.finfo(dtype).eps * norm_of_A).double())  # has no sign
    assert (errors <= 3 * result.error_estimates + float(kernel) * B.norm(dim=0)).all()


def test_signs_of_an_indefinite_matrix_are_those_of_its_eigenvalues():
    eigenvalues = torch.cat([-torch.linspace(0.5, 1, 40), torch.linspace(0.5, 2, 60)]).double()
    A, B, exact = problem(eigenvalues, torch.sign)
    result = apply_function(MatrixOperator(A), torch.sign, B, rtol=1e-10)
    assert result.converged.all()
    torch.testing.assert_close(result.x, exact, rtol=0, atol=1e-8)


@unconverged
def test_what_rounding_does_to_a_logarithm_is_in_the_estimate():
    A, B, exact = problem(torch.logspace(-5, 0, 100, dtype=F64), torch.log)
    result = apply_function(MatrixOperator(A.float()), torch.log, B.float())
    assert ((result.x - exact).norm(dim=0) <= 2 * result.error_estimates).all()


@unconverged
@pytest.mark.parametrize("keep_basis", [True, False])
@pytest.mark.parametrize("stop", ["interrupted", "out of time"])
def test_a_stopped_run_returns_what_its_steps_give(stop, keep_basis):
    A, B, _ = problem(torch.logspace(-3, 0, 100, dtype=F64), torch.log)
    calls = []

    def matmat(V):
        calls.append(V)
        if stop == "interrupted" and len(calls) == 8:
            raise KeyboardInterrupt
        return A @ V

    op = LambdaOperator(100, lambda v: A @ v, matmat=matmat, dtype=F64)
    limit = {} if stop == "interrupted" else {"max_seconds": 1e-9}
    steps = 7 if stop == "interrupted" else 1
    with pytest.warns(
        NotConvergedWarning, match=f"{stop}: 3 columns not converged after {steps} s"
    ):
        result = apply_function(op, torch.log, B, keep_basis=keep_basis, **limit)
    assert result.steps == steps
    expected = apply_function(MatrixOperator(A), torch.log, B, steps).x
    torch.testing.assert_close(result.x, expected, rtol=1e-12, atol=1e-12)


def test_a_run_interrupted_before_its_first_product_has_no_result():
    def interrupt(v):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply_function(LambdaOperator(3, interrupt, dtype=F64), torch.exp, torch.ones(3).double())


def test_small_vectors_do_not_vanish_in_float32():
    b = torch.arange(1.0, 7.0)
    op = MatrixOperator(torch.diag(b))
    tiny, plain = (apply_function(op, torch.sqrt, c).x for c in (b * 2.0**-90, b))
    assert torch.equal(tiny, plain * 2.0**-90)


def test_too_few_steps_are_said_to_be_too_few():
    A, B, _ = problem(torch.logspace(-6, 0, 100, dtype=F64), torch.log)
    with pytest.warns(NotConvergedWarning, match="3 columns not converged after 10 steps; raise"):
        result = apply_function(MatrixOperator(A), torch.log, B, 10)
    assert not result.converged.any()
    assert "0 of 3 converged | 10 steps" in repr(result)
    assert "3 columns not converged after 10 steps; raise steps" in repr(result)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, OptionError, "steps to be at least 1"),
        ({"rtol": -1.0}, OptionError, "rtol not negative"),
        ({"b": torch.ones(3, dtype=F64)}, VectorError, r"expected b of shape \(2,\)"),
        ({"b": torch.ones(2)}, VectorError, "expected b in torch.float64"),
        ({"b": torch.full((2,), torch.nan, dtype=F64)}, NonFiniteError, "b has NaN"),
        ({"f": torch.log}, NonFiniteError, "f is not finite at the Ritz value -1"),
        ({"f": torch.sum}, VectorError, "entry by entry"),
    ],
)
def test_what_cannot_be_applied_is_refused(options, error, message):
    op = MatrixOperator(torch.diag(torch.tensor([-1.0, 2.0], dtype=F64)))
    with pytest.raises(error, match=message):
        apply_function(op, **({"f": torch.exp, "b": torch.ones(2, dtype=F64)} | options))
