"""A wrong operator is caught, and told what is wrong with it; a right one never is."""

import random

import numpy as np
import pytest
import scipy.sparse
import torch

from torchlinop import LambdaOperator, MatrixOperator, as_linear_operator
from torchlinop.errors import OptionError
from torchlinop.testing.answers import assert_calibrated, assert_eigenpairs
from torchlinop.testing.assertions import (
    assert_deterministic,
    assert_finite,
    assert_linear,
    assert_positive_semidefinite,
    assert_symmetric,
)
from torchlinop.testing.equality import assert_equal_operators
from torchlinop.testing.gallery import with_spectrum
from torchlinop.testing.subjects import as_operator

F64 = torch.float64


def semidefinite(n, dtype=F64, seed=0):
    return with_spectrum(torch.linspace(0, 3, n, dtype=F64), seed)[0].to(dtype)


SMALL, LARGE = semidefinite(40), semidefinite(300)


def assert_all_hold(A, **how):
    assert_finite(A, products=4, **how)
    assert_deterministic(A, products=3, **how)
    assert_linear(A, **how)
    assert_symmetric(A, **how)
    assert_positive_semidefinite(A, **how)
    assert_equal_operators(A, A, **how)


@pytest.mark.parametrize(
    "kind",
    [
        torch.clone,
        lambda A: A.numpy(),
        lambda A: scipy.sparse.csr_array(A.numpy()),
        lambda A: as_linear_operator(MatrixOperator(A)),
        lambda A: LambdaOperator(len(A), lambda v: A @ v, dtype=A.dtype),
    ],
    ids=["tensor", "array", "sparse", "scipy", "ours"],
)
def test_every_kind_of_operator_is_taken(kind):
    assert_all_hold(kind(SMALL))
    assert_equal_operators(kind(SMALL), SMALL)


def test_a_function_is_taken_with_its_size():
    assert_all_hold(lambda v: SMALL @ v, size=40)
    with pytest.raises(OptionError, match="expected the size n of a function"):
        assert_linear(lambda v: v)


@pytest.mark.parametrize("nothing", [None, "A", [[1.0, 0.0], [0.0, 1.0]]])
def test_what_multiplies_nothing_is_refused(nothing):
    with pytest.raises(
        OptionError, match=r"expected an operator, a matrix or a function, got \w+;"
    ):
        assert_linear(nothing)


def test_a_function_of_arrays_is_taken_with_a_dtype_of_numpy():
    A = SMALL.numpy()
    assert_all_hold(A.__matmul__, size=40, dtype=np.float64)
    assert_equal_operators(A.__matmul__, SMALL, dtype="float64")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_arrays_of_cupy_are_taken():
    cupy = pytest.importorskip("cupy")
    assert_all_hold(cupy.asarray(SMALL.numpy()))
    assert_equal_operators(cupy.asarray(LARGE.numpy()), LARGE)
    assert_equal_operators(LARGE, cupy.asarray(LARGE.numpy()))


def test_a_function_may_differentiate():
    x = torch.ones(5, dtype=F64, requires_grad=True)

    def hessian_of_quartic(v):
        (g,) = torch.autograd.grad((x**4).sum(), x, create_graph=True)
        return torch.autograd.grad(g @ v, x, create_graph=True)[0]

    assert_linear(hessian_of_quartic, size=5)
    assert_equal_operators(hessian_of_quartic, 12 * torch.eye(5, dtype=F64))


def test_a_function_has_the_size_of_what_it_is_compared_with():
    assert_equal_operators(lambda v: SMALL @ v, SMALL)
    assert_equal_operators(SMALL, lambda v: SMALL @ v)


@pytest.mark.parametrize("n", [40, 300])
def test_operators_of_two_dtypes_are_equal_to_the_coarser_one(n):
    A = semidefinite(n)
    assert_equal_operators(A.float(), A)
    assert_equal_operators(A, A.float())
    assert_equal_operators(A.to(torch.complex64), A)
    with pytest.raises(AssertionError, match=r"differ by more than rtol=1\.2e-04"):
        assert_equal_operators(1.001 * A, A.float())


@pytest.mark.filterwarnings("ignore")  # it imports what torch has deprecated
def test_an_operator_of_curvlinops_is_taken():
    curvlinops = pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).double()
    data = [(torch.randn(5, 3, dtype=F64), torch.randn(5, 2, dtype=F64))]
    parameters = list(model.parameters())
    G = curvlinops.GGNLinearOperator(
        model, torch.nn.MSELoss(), parameters, data, check_deterministic=False
    )
    assert_all_hold(G)


def test_a_nonlinear_product_is_caught():
    with pytest.raises(AssertionError, match=r"A\(u \+ c v\) - A u - c A v is .* of the products"):
        assert_linear(lambda v: SMALL @ v + 1e-9 * v**2, size=40)


def test_blocks_that_differ_from_vectors_are_caught():
    op = LambdaOperator(40, lambda v: SMALL @ v, matmat=lambda V: SMALL @ V + 1e-9, dtype=F64)
    with pytest.raises(AssertionError, match="a block of products differs from single ones by"):
        assert_linear(op)


@pytest.mark.parametrize(
    "noise",
    [
        torch.rand,
        lambda n: torch.as_tensor(np.random.rand(n)),
        lambda n: torch.full((n,), random.random()),
    ],
    ids=["torch", "numpy", "python"],
)
def test_dependence_on_global_seeds_is_caught_and_the_seeds_restored(noise):
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    with pytest.raises(AssertionError, match="repeating a product changes it by"):
        assert_deterministic(lambda v: SMALL @ v + 1e-6 * noise(40).to(v), size=40)
    if noise is not torch.rand:
        assert torch.rand(1) == expected[0]


def test_a_negative_eigenvalue_is_proved():
    A = with_spectrum(torch.linspace(-1e-6, 2, 50, dtype=F64))[0]
    with pytest.raises(AssertionError, match="x\\^T A x = -1e-06 for a unit vector x"):
        assert_positive_semidefinite(A)


def test_operators_of_two_sizes_are_not_equal():
    with pytest.raises(AssertionError, match=r"one size, got \(40, 40\) and \(300, 300\)"):
        assert_equal_operators(SMALL, LARGE)


SPECTRUM = torch.tensor([5, 5, 3, 2, 1, 0, 0, -4], dtype=F64)
A8, Q8 = with_spectrum(SPECTRUM)


@pytest.mark.parametrize(
    ("which", "columns"), [("LA", [0, 1, 2]), ("SA", [7, 5, 6]), ("LM", [0, 1, 7])]
)
def test_right_eigenpairs_pass(which, columns):
    assert_eigenpairs(
        A8, SPECTRUM[columns], Q8[:, columns], rtol=1e-12, exact=SPECTRUM, which=which
    )


@pytest.mark.parametrize(
    ("values", "vectors", "message"),
    [
        ([5, 5, 3], Q8[:, [0, 0, 2]], r"\|⟨x_i, x_j⟩ − δ_ij\| within .* got 1"),
        ([5, 3, 2], Q8[:, [0, 2, 3]], "5 came 1 times and is wanted 2 times|3 came 1 times"),
        ([5, 5, 3.1], Q8[:, :3], "within rtol .* got 0.1 for pair 3 of 3"),
        ([5, 5, np.nan], Q8[:, :3], "got (inf|nan) for pair 3 of 3"),
        ([5, 5, np.inf], Q8[:, :3], "got (inf|nan) for pair 3 of 3"),
        ([5, 5, 3], Q8.T[:3], r"expected eigenvectors as columns \(8, 3\), got \(3, 8\)"),
    ],
)
def test_wrong_eigenpairs_are_caught(values, vectors, message):
    with pytest.raises(AssertionError, match=message):
        assert_eigenpairs(A8, values, vectors, rtol=1e-10, exact=SPECTRUM)


def test_infinite_eigenvalues_allow_nothing():
    with pytest.raises(AssertionError, match=r"got (inf|nan) for pair 1 of 1"):
        assert_eigenpairs(A8, [torch.inf], Q8[:, :1], rtol=1e-10)


@pytest.mark.parametrize("column", [1, 2])
def test_one_of_a_mirrored_pair_is_as_large_as_the_other(column):
    A = torch.diag(torch.tensor([3, 2, -2, 1], dtype=F64))
    pairs = A.diagonal()[[0, column]], torch.eye(4, dtype=F64)[:, [0, column]]
    assert_eigenpairs(A, *pairs, rtol=1e-12, exact=A.diagonal().numpy(), which="LM")


def test_fewer_exact_eigenvalues_than_pairs_are_refused():
    with pytest.raises(OptionError, match="expected all 8 exact eigenvalues, got 2 for 3 pairs"):
        assert_eigenpairs(A8, SPECTRUM[:3], Q8[:, :3], rtol=1e-10, exact=SPECTRUM[:2])


def test_lines_of_the_message_print_the_residual(capsys):
    values, X = np.array([5, 5, 3.1]), Q8[:, :3].numpy()
    with pytest.raises(AssertionError, match=r"got 0\.1 for pair 3 of 3") as error:
        assert_eigenpairs(A8, values, X, rtol=1e-10)
    lines = str(error.value).partition("Reproduce:\n")[2].splitlines()
    code = "\n".join(line[4:] for line in lines)
    exec(code, {"A": A8.numpy(), "eigenvalues": values, "eigenvectors": X})
    assert float(capsys.readouterr().out.split()[-1]) == pytest.approx(0.1)


def test_the_worst_error_is_named():
    with pytest.raises(AssertionError, match=r"the worst is number 7, off by 60 with a .* of 2"):
        assert_calibrated([30.0] * 7 + [60.0] + [30.0] * 12, [2.0] * 20)


def test_error_bars_that_hold_pass_and_half_as_long_ones_do_not():
    errors = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=F64)
    bars = torch.ones(200, dtype=F64)
    assert_calibrated(errors, bars, conservative=False)
    with pytest.raises(AssertionError, match=r"too short: .* rms\(standard error\) = 1\.99"):
        assert_calibrated(errors, bars / 2)


def test_error_bars_ten_times_too_long_are_caught_on_request():
    errors = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=F64)
    bars = 10 * torch.ones(1000, dtype=F64)
    assert_calibrated(errors, bars)
    with pytest.raises(AssertionError, match="error bars are too long: 1000 of 1000"):
        assert_calibrated(errors, bars, conservative=False)


@pytest.mark.parametrize(("error", "bar"), [(np.nan, 1), (np.inf, 1), (0, np.nan)])
def test_one_error_that_is_no_number_is_not_lost_among_many(error, bar):
    with pytest.raises(AssertionError, match=r"1 of 100 errors .* NaN or infinite, the first"):
        assert_calibrated([0.1] * 99 + [error], [1.0] * 99 + [bar])


def test_a_level_in_percent_is_refused():
    with pytest.raises(OptionError, match="expected a level between 0 and 1, got 95"):
        assert_calibrated([9.0] * 20, [1.0] * 20, level=95)


def test_errors_need_a_standard_error_each():
    with pytest.raises(OptionError, match="as many standard errors as errors, got 1 and 2"):
        assert_calibrated([0.1, 0.2], [0.1])


def test_an_unknown_end_of_the_spectrum_is_refused():
    with pytest.raises(OptionError, match="unknown which 'XX'; choose one of LA, SA, LM"):
        assert_eigenpairs(A8, SPECTRUM[:1], Q8[:, :1], rtol=1, exact=SPECTRUM, which="XX")


def test_an_operator_of_ours_is_itself():
    op = MatrixOperator(SMALL)
    assert as_operator(op) is op
