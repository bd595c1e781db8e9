"""A wrong operator is caught, and told what is wrong and by how much; a right one never is."""

import contextlib
import io
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchlinop import LambdaOperator
from torchlinop.testing import (
    RotatedOperator,
    assert_deterministic,
    assert_equal_operators,
    assert_finite,
    assert_linear,
    assert_positive_semidefinite,
    assert_symmetric,
    spectra,
    strategies,
    stress_operators,
    stress_spectra,
)

F32, F64 = torch.float32, torch.float64
SIZES = [1, 2, 40, 300, 10**5]

# The smallest relative defects that are seen: a thousand roundoffs, and room.
SEEN = [(F64, 1e-6), (F64, 1e-11), (F32, 3e-3)]


def right(n, dtype=F64, seed=0):
    """Eigenvalues from 1 to 3."""
    return RotatedOperator(spectra.flat(n).to(dtype), seed=seed)


def with_product(op, of_block):
    """The operator ``V ↦ of_block(V, A V)``, for vectors as for blocks."""
    return LambdaOperator(
        op.size,
        lambda v: of_block(v[:, None], op.matmat(v[:, None]))[:, 0],
        matmat=lambda V: of_block(V, op.matmat(V)),
        dtype=op.dtype,
    )


def assert_all_hold(A, seed):
    assert_finite(A, products=2, seed=seed)
    assert_deterministic(A, products=2, seed=seed)
    assert_linear(A, seed=seed)
    assert_symmetric(A, seed=seed)
    assert_equal_operators(A, A, seed=seed)


@settings(max_examples=1000)
@given(op=strategies.operators(), seed=st.integers(0, 2**32 - 1))
def test_a_right_operator_passes(op, seed):
    assert_all_hold(op, seed)


@settings(max_examples=1000)
@given(
    op=strategies.operators(eigenvalues=strategies.spectra(positive=True)),
    seed=st.integers(0, 2**32 - 1),
)
def test_an_operator_without_negative_eigenvalues_passes(op, seed):
    assert_positive_semidefinite(op, seed=seed)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", stress_spectra())
def test_a_right_operator_of_any_spectrum_passes(name, dtype):
    assert_all_hold(stress_operators(500, dtype)[name], seed=0)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("n", SIZES)
def test_a_right_operator_of_any_size_passes(n, dtype):
    assert_all_hold(right(n, dtype), seed=0)


@pytest.mark.parametrize("exponent", [-100, 100])
def test_scales_whose_squares_are_no_float32_numbers_pass(exponent):
    op = RotatedOperator(2.0**exponent * spectra.flat(50).float())
    assert_all_hold(op, seed=0)


@pytest.mark.parametrize(("dtype", "defect"), SEEN)
@pytest.mark.parametrize("n", SIZES)
def test_an_operator_off_by_a_factor_is_caught(n, dtype, defect):
    A = right(n, dtype)
    with pytest.raises(AssertionError, match=rf"^\d+ of {n} rows .*differ by more than rtol="):
        assert_equal_operators((1 + defect) * A, A)


@pytest.mark.parametrize(("dtype", "defect"), SEEN)
@pytest.mark.parametrize("n", SIZES)
def test_one_wrong_row_is_named(n, dtype, defect):
    A, row = right(n, dtype), n // 3
    factors = torch.ones(n, 1, dtype=dtype)
    factors[row] += 3 * defect
    wrong = with_product(A, lambda V, AV: AV * factors)
    with pytest.raises(AssertionError, match=rf"^1 of {n} rows .*(row {row} by|entry \({row},)"):
        assert_equal_operators(wrong.to_dense() if n < 300 else wrong, A)


@pytest.mark.parametrize(("dtype", "defect"), [(F64, 1e-8), (F64, 3e-12), (F32, 1e-3)])
@pytest.mark.parametrize("n", SIZES[1:])
def test_an_asymmetry_is_measured(n, dtype, defect):
    E = torch.arange(n) < n // 2 * 2  # pairs of entries that are swapped, with a sign
    signs = torch.where(torch.arange(n) % 2 == 0, 1, -1) * E

    def product(V, AV):
        swapped = V[: n // 2 * 2].view(-1, 2, V.shape[1]).flip(1).reshape(-1, V.shape[1])
        antisymmetric = torch.cat([swapped, V[n // 2 * 2 :]]) * signs[:, None].to(V.dtype)
        return AV + 2 * defect * antisymmetric

    with pytest.raises(
        AssertionError, match=r"\|<u, A v> - <A u, v>\| is .* of the prod"
    ) as caught:
        assert_symmetric(with_product(right(n, dtype), product))
    relative = float(re.search(r", (\S+) of the products", str(caught.value))[1])
    assert 0.3 * defect <= relative <= 6 * defect


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("n", SIZES)
def test_nan_once_in_a_hundred_products_is_found(n, dtype):
    calls = iter(range(1000))

    def product(V, AV):
        AV[n // 2] = torch.nan if next(calls) == 99 else AV[n // 2]
        return AV

    with pytest.raises(
        AssertionError, match=rf"product 100 of 128 has 1 of {n} entries .* the first at {n // 2}\."
    ):
        assert_finite(with_product(right(n, dtype), product))


def test_nan_in_blocks_only_is_found():
    op = with_product(right(40), lambda V, AV: AV if V.shape[1] == 1 else AV * torch.nan)
    with pytest.raises(AssertionError, match=r"a block of 8 products has 320 entries .* \(0, 0\)"):
        assert_finite(op, products=1)


@pytest.mark.parametrize("assertion", [assert_deterministic, assert_linear, assert_symmetric])
def test_products_that_are_nan_are_wrong_for_every_assertion(assertion):
    with pytest.raises(AssertionError, match=" nan, nan of the products"):
        assertion(with_product(right(40), lambda V, AV: AV * torch.nan))


def test_infinite_products_do_not_excuse_a_difference():
    wrong = right(40).to_dense()
    wrong[3, 3] = torch.inf
    with pytest.raises(AssertionError, match=r"1 of 40 rows .*entry \(3, 0\) is nan against"):
        assert_equal_operators(wrong, right(40))
    with pytest.raises(AssertionError, match=r"1 of 40 rows .*entry \(3, 0\) is .* against nan"):
        assert_equal_operators(right(40), wrong)
    with pytest.raises(AssertionError, match=r"40 entries of the matrix .* first at \(3, 0\)"):
        assert_positive_semidefinite(wrong)


@pytest.mark.parametrize(("dtype", "defect"), [(F64, 1e-6), (F64, 1e-11), (F32, 1e-3)])
@pytest.mark.parametrize("n", SIZES)
def test_dependence_on_the_global_seed_is_caught(n, dtype, defect):
    noisy = with_product(right(n, dtype), lambda V, AV: AV * (1 + defect * torch.randn(()).to(V)))
    with pytest.raises(AssertionError, match=r"^repeating a product changes it by .* of the prod"):
        assert_deterministic(noisy)


@pytest.mark.parametrize("n", [40, 1000])
def test_a_negative_eigenvalue_is_proved(n):
    op = RotatedOperator(torch.linspace(-1e-6, 2, n, dtype=F64))
    with pytest.raises(AssertionError, match=r"x\^T A x = -1e-06 for a unit vector x, where"):
        assert_positive_semidefinite(op)


def reproduced(error, **operators):
    """The number that the lines of the message print."""
    lines = str(error.value).partition("Reproduce:\n")[2]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec("\n".join(line[4:] for line in lines.splitlines()), operators)
    return float(out.getvalue())


def claimed(error, before):
    """The number that the message says after these words."""
    return float(re.search(before + r" ([0-9.e+-]*[0-9])", str(error.value))[1])


def asymmetric():
    A = right(40).to_dense()
    A[3, 4] += 1e-5
    return A.numpy()


def nonlinear(v):
    return 2 * v + 1e-3 * v**2


def in_blocks():
    return LambdaOperator(9, lambda v: 2 * v, matmat=lambda V: 2 * V + 1e-6, dtype=F64)


@pytest.mark.parametrize(
    ("assertion", "A", "how", "before"),
    [
        (assert_symmetric, asymmetric(), {}, r"v>\| is"),
        (assert_linear, nonlinear, {"size": 9, "dtype": F32}, "A v is"),
        (assert_linear, nonlinear, {"size": 9, "dtype": np.float32}, "A v is"),
        (assert_linear, in_blocks(), {}, "single ones by"),
        (assert_positive_semidefinite, right(40).shift(-2), {}, "x ="),
        (assert_positive_semidefinite, right(300).shift(-2), {}, "x ="),
        (assert_finite, lambda v: v * torch.nan, {"size": 7}, "has"),
    ],
)
def test_lines_of_the_message_print_the_defect_it_says(assertion, A, how, before):
    with pytest.raises(AssertionError, match="seed=5") as error:
        assertion(A, seed=5, **how)
    assert reproduced(error, A=A) == pytest.approx(claimed(error, before), rel=1e-2)


@pytest.mark.parametrize(("n", "before"), [(40, "difference of"), (300, r"row \d+ by")])
def test_lines_of_the_message_print_the_difference_it_says(n, before):
    A = right(n)
    wrong = (1 + 1e-6) * A.to_dense().numpy()
    with pytest.raises(AssertionError) as error:
        assert_equal_operators(wrong, A)
    difference = abs(reproduced(error, A=wrong, B=A))
    assert difference == pytest.approx(claimed(error, before), rel=1e-2)
