"""LOBPCG finds either end of a prescribed spectrum, within its budget, or says that it did not."""

import pytest
import scipy.sparse
import torch
from eigen_spectra import F64, assert_honest, matrix, spectrum

from torchlinop import (
    CountingOperator,
    GGNOperator,
    KFACOperator,
    LambdaOperator,
    MatrixOperator,
    from_linear_operator,
)
from torchlinop.algorithms.lanczos import lanczos
from torchlinop.algorithms.lobpcg import lobpcg
from torchlinop.errors import (
    NonFiniteError,
    NotConvergedError,
    NotConvergedWarning,
    OptionError,
    SymmetryError,
    VectorError,
)
from torchlinop.testing import gallery

BUDGETS = [("poly", 105), ("slow", 195), ("cluster", 90), ("nn", 150), ("nnhard", 510)]


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize(("name", "reference"), BUDGETS)
def test_ten_largest_pairs_are_found_within_the_budget(name, reference, dtype):
    eigenvalues = spectrum(name)
    A = matrix(eigenvalues, dtype)
    result = lobpcg(MatrixOperator(A), 10)
    assert result.status == "converged"
    assert result.residual_kind == "true"
    assert result.converged.all()
    assert result.matvecs <= 1.3 * reference
    assert_honest(result, A, eigenvalues[:10])


STRESS = [
    "zero", "identity", "rank 1", "rank 5", "1 and 50", "4-fold", "mirrored", "nn",
    "condition 1e16",
]  # fmt: skip


@pytest.mark.parametrize("scale", [1, 1e-12, 1e12])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("name", STRESS)
def test_degenerate_spectra_at_any_scale(name, dtype, scale):
    eigenvalues = scale * spectrum(name, 200)
    A = matrix(eigenvalues, dtype)
    result = lobpcg(MatrixOperator(A), 4)
    assert result.converged.all()
    assert_honest(result, A, eigenvalues[:4])


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_smallest_eigenvalues_of_condition_1e16_are_honestly_not_found(dtype):
    eigenvalues = spectrum("condition 1e16", 200)
    A = matrix(eigenvalues, dtype)
    with pytest.warns(NotConvergedWarning, match="pairs reached tol"):
        result = lobpcg(MatrixOperator(A), 4, 400, which="SA")
    assert not result.converged.all()
    assert_honest(result, A, eigenvalues.flip(0)[:4])


@pytest.mark.parametrize("power", [-40, 40])
def test_scaling_by_a_power_of_two_scales_the_result_exactly(power):
    A = matrix(spectrum("nn", 200))
    one, other = (lobpcg(MatrixOperator(B), 5) for B in (A, A * 2.0**power))
    assert other.matvecs == one.matvecs
    assert torch.equal(other.eigenvalues, one.eigenvalues * 2.0**power)
    assert torch.equal(other.eigenvectors, one.eigenvectors)


def test_defect_20_tolerance_is_relative_and_guard_vectors_are_not_waited_for():
    # An absolute tolerance √ε n is met by any vector where ‖A‖ is small.
    eigenvalues = 1e-9 * spectrum("cluster")
    result = lobpcg(MatrixOperator(matrix(eigenvalues)), 10)
    assert ((result.eigenvalues - eigenvalues[:10]).abs() <= 1e-12 * eigenvalues[0]).all()
    # The gap behind the guards sets the pace, none of which has converged.
    assert result.matmats <= 10


def test_a_preconditioner_finds_the_smallest_eigenvalues():
    eigenvalues = spectrum("condition 1e16", 400) ** 0.25  # condition 1e4
    A = matrix(eigenvalues)
    M = MatrixOperator(torch.linalg.inv(A + 1e-5 * torch.eye(400, dtype=F64)))
    result = lobpcg(MatrixOperator(A), 5, which="SA", preconditioner=M)
    assert result.converged.all()
    assert result.matmats <= 40
    torch.testing.assert_close(result.eigenvalues, eigenvalues.flip(0)[:5], rtol=1e-9, atol=0)


def test_the_inverse_of_kfac_is_a_preconditioner():
    problem = gallery.mlp()
    data = (problem.model, problem.batches, problem.forward_fn, problem.criterion)
    ggn = GGNOperator(*data).shift(1e-2)
    M = KFACOperator(*data).inverse(1e-2)
    plain, fast = (lobpcg(ggn, 3, which="SA", preconditioner=P, tol=1e-3) for P in (None, M))
    assert fast.matvecs < 0.8 * plain.matvecs
    assert_honest(fast, ggn.to_dense(), torch.linalg.eigvalsh(ggn.to_dense())[:3])


def test_a_four_fold_eigenvalue_is_found_four_times():
    eigenvalues = spectrum("4-fold")
    result = lobpcg(MatrixOperator(matrix(eigenvalues)), 5)
    assert ((result.eigenvalues - 10).abs() < 1e-9).tolist() == [True] * 4 + [False]
    assert result.possible_multiplicity


def test_a_start_from_an_earlier_result_saves_products():
    A = matrix(spectrum("slow"))
    first = lobpcg(MatrixOperator(A), 5)
    near = MatrixOperator(A + 1e-6 * torch.ones_like(A) / len(A))
    assert lobpcg(near, 5, v0=first).matvecs < first.matvecs / 2
    assert lobpcg(MatrixOperator(A), 5, v0=lanczos(MatrixOperator(A), 5)).matmats <= 3


def test_guard_vectors_take_no_products_and_save_some():
    A = MatrixOperator(matrix(spectrum("slow", 200)))
    without, guarded = (lobpcg(A, 3, guard=guard, verify=False) for guard in (0, 3))
    assert guarded.matvecs < 0.9 * without.matvecs
    assert guarded.matvecs <= 3 * guarded.matmats


def test_a_budget_that_leaves_no_products_to_verify_is_spent_on_the_pairs():
    A = matrix(spectrum("nn", 200))
    needed = lobpcg(MatrixOperator(A), 3, verify=False).matvecs
    result = lobpcg(MatrixOperator(A), 3, needed)
    assert (result.status, result.residual_kind) == ("converged", "recurrence")
    assert_honest(result, A, spectrum("nn", 200)[:3])


def test_a_sparse_matrix_of_scipy_has_known_eigenvalues():
    n = 60
    laplacian = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(n, n))
    result = lobpcg(from_linear_operator(laplacian.tocsr()), 3, which="SA")
    angles = torch.arange(1, 4, dtype=F64) * torch.pi / (n + 1)
    torch.testing.assert_close(result.eigenvalues, 2 - 2 * angles.cos(), rtol=1e-8, atol=0)


def test_a_hermitian_matrix_has_real_eigenvalues():
    U = torch.linalg.qr(torch.randn(80, 80, dtype=torch.complex128))[0]
    eigenvalues = spectrum("nn", 80)
    A = (U * eigenvalues) @ U.mH
    result = lobpcg(MatrixOperator((A + A.mH) / 2), 3)
    torch.testing.assert_close(result.eigenvalues, eigenvalues[:3], rtol=1e-11, atol=0)


def test_a_bfloat16_operator_is_solved_to_its_rounding():
    A = matrix(spectrum("nn", 200))
    rounded = LambdaOperator(
        200, lambda v: (A @ v.double()).bfloat16(), dtype=torch.bfloat16,
        matmat=lambda V: (A @ V.double()).bfloat16(),
    )  # fmt: skip
    result = lobpcg(rounded, 2)
    assert result.eigenvectors.dtype == torch.float32
    torch.testing.assert_close(result.eigenvalues, torch.tensor([10.0, 9.111]), rtol=5e-3, atol=0)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_block_as_large_as_the_matrix_solves_it_at_once(k):
    A = matrix(torch.tensor([3.0, 2.0, 1.0], dtype=F64))
    result = lobpcg(MatrixOperator(A), k)
    assert result.converged.all()
    assert_honest(result, A, torch.tensor([3.0, 2.0, 1.0], dtype=F64)[:k])


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_an_unreachable_tolerance_ends_in_stagnation(dtype):
    A = matrix(spectrum("nn", 200), dtype)
    with pytest.warns(NotConvergedWarning, match="rounding or noise of the products"):
        result = lobpcg(MatrixOperator(A), 3, tol=0)
    assert result.status == "stagnated"
    assert result.residual_norms.max() <= 100 * torch.finfo(dtype).eps


def test_a_budget_is_kept_and_strict_raises_with_the_result():
    counting = CountingOperator(MatrixOperator(matrix(spectrum("slow", 200))))
    with pytest.raises(NotConvergedError, match=r"[0-4] of 5 pairs reached") as caught:
        lobpcg(counting, 5, 40, strict=True)
    result = caught.value.result
    assert result.status == "maxmatvecs"
    assert counting.matvecs == result.matvecs <= 40


def test_time_is_limited():
    with pytest.warns(NotConvergedWarning):
        result = lobpcg(MatrixOperator(matrix(spectrum("slow", 200))), 5, max_seconds=1e-9)
    assert result.status == "maxseconds"


def interrupted_at(A, call):
    calls = iter(range(100))

    def product(V):
        if next(calls) == call:
            raise KeyboardInterrupt
        return A @ V

    return LambdaOperator(200, lambda v: product(v[:, None])[:, 0], matmat=product, dtype=F64)


def test_ctrl_c_returns_what_there_is():
    A = matrix(spectrum("slow", 200))
    with pytest.warns(NotConvergedWarning, match="To go on, restart from v0=result"):
        result = lobpcg(interrupted_at(A, 4), 5)
    assert result.status == "interrupted"
    assert_honest(result, A, result.eigenvalues)


def test_ctrl_c_where_convergence_is_judged_returns_what_was_claimed():
    A = matrix(spectrum("nn", 200))
    last = lobpcg(MatrixOperator(A), 3).matmats - 1
    result = lobpcg(interrupted_at(A, last), 3)
    assert (result.status, result.residual_kind) == ("interrupted", "recurrence")
    assert_honest(result, A, spectrum("nn", 200)[:3])


OPERATOR = MatrixOperator(matrix(spectrum("nn", 50)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": 0}, OptionError, "expected k from 1 to n = 50, got 0"),
        ({"k": 51}, OptionError, "expected k from 1 to n = 50, got 51"),
        ({"which": "LM"}, OptionError, 'unknown which \'LM\'; choose "LA" or "SA"'),
        ({"tol": -1.0}, OptionError, "expected tol from 0 to 1"),
        ({"guard": -1}, OptionError, "expected guard to be at least 0, got -1"),
        ({"max_iter": 1}, OptionError, "to be at least 2, one for every column of the block"),
        ({"v0": torch.zeros(50, dtype=F64)}, VectorError, "a finite v0 other than zero"),
        ({"v0": torch.ones(49, dtype=F64)}, VectorError, r"expected v0 of shape \(50,\)"),
        ({"v0": torch.ones(50, 5, dtype=F64)}, VectorError, "with b from 1 to 4"),
        (
            {"preconditioner": MatrixOperator(torch.eye(49, dtype=F64))},
            VectorError,
            "expected a preconditioner on the space of the operator",
        ),
    ],
)
def test_bad_options_are_refused_before_a_product(options, error, message):
    counting = CountingOperator(OPERATOR)
    with pytest.raises(error, match=message):
        lobpcg(counting, **({"k": 2, "guard": 2} | options))
    assert counting.matvecs == 0


def test_products_that_are_not_finite_are_named():
    op = LambdaOperator(50, lambda v: v * torch.nan, dtype=F64)
    with pytest.raises(NonFiniteError, match="hold NaN or infinity, by product 3"):
        lobpcg(op, 3)


def test_a_preconditioner_that_is_not_finite_is_named():
    M = LambdaOperator(50, lambda v: v * torch.nan, dtype=F64)
    with pytest.raises(NonFiniteError, match="or those of the preconditioner, <LambdaOperator"):
        lobpcg(OPERATOR, 3, preconditioner=M)


def test_a_matrix_that_is_not_symmetric_is_named():
    with pytest.raises(SymmetryError, match="noise floor"):
        lobpcg(MatrixOperator(torch.randn(50, 50, dtype=F64)), 3)
