"""A run that is cut short returns what there is, and says why it stopped and what to do."""

import warnings

import pytest
import torch
from eigen_spectra import F64, matrix, spectrum

from torchlinop import LambdaOperator, MatrixOperator
from torchlinop.algorithms.lanczos import lanczos
from torchlinop.errors import NotConvergedError, NotConvergedWarning, OrthogonalityWarning

EXACT = spectrum("nn", 300)  # ten positive outliers first, five negative ones last
A = matrix(EXACT)
OPERATOR = MatrixOperator(A)


def test_too_few_products_are_said_with_what_to_do():
    message = (
        r"[0-4] of 5 pairs reached tol=1e-06 after 8 matvecs; worst residual .* "
        r"Raise max_iter or ncv \(now 20\), or restart from v0=result"
    )
    with pytest.warns(NotConvergedWarning, match=message):
        result = lanczos(OPERATOR, 5, 8, which="LA")
    assert (result.status, result.matvecs) == ("maxmatvecs", 8)
    assert not result.converged.all()
    with pytest.raises(NotConvergedError, match=message) as raised:
        lanczos(OPERATOR, 5, 8, which="LA", strict=True)
    assert torch.equal(raised.value.result.eigenvalues, result.eigenvalues)


def test_a_tolerance_below_rounding_is_called_stagnation():
    operator = MatrixOperator(A.float())
    with pytest.warns(NotConvergedWarning, match="rounding or noise of the products"):
        result = lanczos(operator, 5, which="LA", tol=1e-9)
    assert result.status == "stagnated"
    torch.testing.assert_close(result.eigenvalues, EXACT[:5].float())


def test_time_is_a_budget():
    with pytest.warns(NotConvergedWarning):
        result = lanczos(OPERATOR, 10, max_seconds=1e-9, which="LA")
    assert result.status == "maxseconds"


def interrupted_at(product):
    count = [0]

    def matvec(v):
        count[0] += 1
        if count[0] == product:
            raise KeyboardInterrupt
        return A @ v

    return LambdaOperator(300, matvec, dtype=F64)


def test_an_interruption_returns_what_has_converged():
    with pytest.warns(NotConvergedWarning):
        result = lanczos(interrupted_at(18), 10, which="LA")
    assert (result.status, result.matvecs) == ("interrupted", 17)
    done = result.converged
    assert 0 < int(done.sum()) < 10
    exact = EXACT[:10]
    torch.testing.assert_close(result.eigenvalues[done], exact[done], rtol=0, atol=1e-8)


def test_an_interruption_before_the_first_product_is_passed_on():
    with pytest.raises(KeyboardInterrupt):
        lanczos(interrupted_at(1), 10)


MODES = ["full", "partial", "local", "none"]


@pytest.mark.filterwarnings("ignore:reorthogonalize")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("product", [2, 7, 19])
def test_ctrl_c_in_any_mode_returns_honest_pairs_up_to_there(mode, product):
    with pytest.warns(NotConvergedWarning, match=r"To go on, restart from v0=result"):
        result = lanczos(interrupted_at(product), 10, which="LA", reorthogonalize=mode)
    assert (result.status, result.matvecs) == ("interrupted", product - 1)
    assert len(result) == min(10, product - 1)
    true = torch.linalg.vector_norm(
        A @ result.eigenvectors - result.eigenvectors * result.eigenvalues, dim=0
    )
    torch.testing.assert_close(result.residual_norms, true, rtol=1e-6, atol=1e-12)


@pytest.mark.filterwarnings("ignore:reorthogonalize")
@pytest.mark.parametrize("mode", MODES)
def test_time_is_a_budget_in_any_mode(mode):
    with pytest.warns(NotConvergedWarning, match="Raise max_seconds, or restart from v0=result"):
        result = lanczos(OPERATOR, 10, max_seconds=1e-9, which="LA", reorthogonalize=mode)
    assert (result.status, result.matvecs, len(result)) == ("maxseconds", 1, 1)


def test_ctrl_c_in_the_clean_up_returns_the_pairs_as_they_were():
    clean = lanczos(OPERATOR, 5, which="LA", verify=True)
    op = interrupted_at(clean.matvecs - 4)
    result = lanczos(op, 5, which="LA", verify=True, basis_dtype=torch.float32)
    assert (result.status, result.residual_kind) == ("interrupted", "recurrence")
    true = torch.linalg.vector_norm(
        A @ result.eigenvectors - result.eigenvectors * result.eigenvalues, dim=0
    )
    assert bool((true <= result.residual_norms).all())


def test_an_invariant_space_that_is_too_small_is_said_in_a_run_without_restarts():
    rank_5 = MatrixOperator(matrix(spectrum("rank 5", 300)))
    with pytest.warns(NotConvergedWarning, match='take reorthogonalize="full", which goes on'):
        result = lanczos(rank_5, 10, which="LA", reorthogonalize="partial")
    assert result.status == "stagnated"
    assert 6 <= len(result) < 10
    assert bool(result.converged.all())


def test_copies_that_a_run_without_restarts_cannot_hold_are_not_claimed_to_be_absent():
    rank_5 = MatrixOperator(matrix(spectrum("rank 5", 300)))
    with pytest.warns(OrthogonalityWarning, match="ended after . products, as it does where"):
        result = lanczos(rank_5, 3, which="SA", reorthogonalize="partial")
    assert result.status == "stagnated"  # three eigenpairs, but 0 is wanted three times
    assert float(result.eigenvalues[-1]) > 0.5


@pytest.mark.parametrize(
    ("stored", "tol", "rounding"),
    [(torch.bfloat16, 1e-3, "2e-03"), (torch.float16, 1e-4, "2e-04")],
)
def test_what_the_rounding_of_the_basis_forbids_is_told_from_noise(stored, tol, rounding):
    message = f"the basis, stored in {stored}, about {rounding} of .A., .* or leave out basis_dtype"
    with pytest.warns(NotConvergedWarning, match=message):
        result = lanczos(OPERATOR, 5, which="LA", tol=tol, basis_dtype=stored)
    assert result.status == "stagnated"
    assert float(result.residual_norms.max()) == pytest.approx(10 * float(rounding), rel=0.25)


@pytest.mark.parametrize("mode", ["full", "none"])
@pytest.mark.parametrize("seed", range(4))
def test_true_residuals_of_the_small_end_know_the_rounding_of_the_large_one(mode, seed):
    B = matrix(spectrum("rank 1", 200)).float()
    exact = torch.linalg.eigvalsh(B.double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = lanczos(
            MatrixOperator(B), 1, 40, which="SA", reorthogonalize=mode, seed=seed, verify=True
        )
    error = (exact - result.eigenvalues.double()).abs().min()
    assert float(error) <= float(result.error_bounds[0])
    assert float(result.residual_norms[0]) > 1e-7 * 10
