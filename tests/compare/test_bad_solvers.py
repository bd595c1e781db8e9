"""Solvers that are wrong by construction are rows that say what is wrong with them."""

import re
import warnings

import pytest
import torch

from torchlinop import LambdaOperator, MatrixOperator
from torchlinop.compare import Answer, compare, eigensolver
from torchlinop.errors import NonFiniteError, OptionError, SymmetryError
from torchlinop.testing import RotatedOperator, spectra

N, K = 60, 4
A = RotatedOperator(spectra.polynomial(N, -1.0), seed=3)
EXACT = A.eigenvalues[:K]
X = A.eigenvectors(torch.arange(K))


def row_of(solver, problem=A, **options):
    options = {"k": K, "seeds": 1, "histories": False, "memory": False, **options}
    return compare(problem, solvers=[solver], **options).rows[0]


def exact(A, request):
    return EXACT, X


def test_the_right_answer_is_ok_and_has_no_error():
    row = row_of(exact)
    assert row.verdict == "ok"
    assert row.error == 0
    assert row.residual < 1e-12
    assert row.orthogonality < 1e-14
    assert (row.converged, row.ghosts, row.missed, row.remarks) == (K, 0, 0, "")


def copies(A, request):
    """The first pair twice, and the last one lost."""
    i = torch.tensor([0, 0, 1, 2])
    return Answer(EXACT[i], X[:, i], torch.zeros(K), torch.ones(K, dtype=torch.bool))


def values_of_copies_with_vectors_of_others(A, request):
    """As by Ritz vectors that have lost their orthogonality: the values tell."""
    i = torch.tensor([0, 0, 1, 2])
    return Answer(EXACT[i], X, converged=torch.ones(K, dtype=torch.bool))


def skips_the_first(A, request):
    i = torch.arange(1, K + 1)
    pairs = A.operator.eigenvalues[i], A.operator.eigenvectors(i)
    return Answer(*pairs, converged=torch.ones(K, dtype=torch.bool))


def small_residuals_claimed(A, request):
    return Answer(EXACT + 1e-3, X, residuals=torch.full((K,), 1e-9))


def near_eigenvalues_claimed(A, request):
    return Answer(EXACT + 1e-3, X, bounds=torch.full((K,), 1e-9))


def convergence_claimed(A, request):
    return Answer(EXACT + 1e-3, X, converged=torch.ones(K, dtype=torch.bool))


@pytest.mark.parametrize(
    ("solver", "reason"),
    [
        (copies, "1 of 4 pairs called converged are copies of others"),
        (copies, "1 of the eigenvalues wanted are missing"),
        (values_of_copies_with_vectors_of_others, "1 of 4 pairs called converged are copies"),
        (small_residuals_claimed, "a residual of 1e-03 is claimed to be 1e-09"),
        (near_eigenvalues_claimed, "an error of 1e-03 is claimed to be 1e-09"),
        (convergence_claimed, "4 of 4 pairs called converged are not"),
    ],
)
def test_a_false_claim_is_named(solver, reason):
    row = row_of(solver)
    assert row.verdict == "false claim"
    assert reason in row.remarks


def test_a_claim_of_nan_hides_no_other():
    claimed = torch.tensor([torch.nan, 1e-9, torch.nan, 1e-9])
    for claims in ({"residuals": claimed}, {"bounds": claimed}):
        assert row_of(lambda A, r, c=claims: Answer(EXACT + 1e-3, X, **c)).verdict == "false claim"


def test_claims_of_convergence_may_be_numbers():
    row = row_of(lambda A, r: Answer(EXACT, X, converged=[1, 1, 1, 0]))
    assert (row.verdict, row.claimed) == ("ok", 3)


def test_what_is_near_no_eigenvalue_is_no_copy():
    row = row_of(convergence_claimed)
    assert (row.ghosts, row.remarks) == (0, "FALSE: 4 of 4 pairs called converged are not")


def test_copies_that_are_not_called_converged_are_no_false_claim():
    i = torch.tensor([0, 1, 2, 2])
    off = torch.tensor([0, 0, 1e-3, 1e-3])
    row = row_of(lambda A, r: Answer(EXACT[i] + off, X[:, i], converged=off == 0))
    assert (row.verdict, row.ghosts) == ("not reached", 1)


def test_small_residuals_do_not_hide_that_an_eigenvalue_is_missing():
    row = row_of(skips_the_first)
    assert (row.verdict, row.false) == ("wrong", ())
    assert row.remarks == "1 of the eigenvalues wanted are missing"


def leaning(angle):
    """Two vectors of a double eigenvalue that are as far as this from orthogonal."""
    B = RotatedOperator(torch.tensor([3.0, 2.0, 2.0, *[0.1] * 9], dtype=torch.float64))
    Y = B.eigenvectors(torch.arange(3))
    Y[:, 2] = angle * Y[:, 1] + (1 - angle**2) ** 0.5 * Y[:, 2]
    return row_of(lambda A, request: (B.eigenvalues[:3], Y), B, k=3)


def test_small_residuals_do_not_hide_that_vectors_are_not_orthogonal():
    row = leaning(0.01)
    assert row.residual < 1e-12
    assert row.verdict == "wrong"
    assert row.remarks == "vectors are not orthogonal: max |XᵀX − I| is 1e-02"
    assert leaning(1e-4).verdict == "ok"


def test_one_of_a_mirrored_pair_is_as_good_as_the_other():
    values = torch.tensor([3.0, -2.0, 2.0, *[0.1] * 9], dtype=torch.float64)
    B = RotatedOperator(values)

    def finds(j):
        i = torch.tensor([0, j])
        return lambda A, request: (values[i], B.eigenvectors(i))

    for j, verdict in ((1, "ok"), (2, "ok"), (3, "wrong")):
        assert row_of(finds(j), B, k=2, which="LM").verdict == verdict


def test_ghosts_and_missed_eigenvalues_are_counted():
    row = row_of(copies)
    assert (row.ghosts, row.missed) == (1, 1)
    assert (row_of(skips_the_first).ghosts, row_of(skips_the_first).missed) == (0, 1)


def test_ghosts_are_found_without_knowing_the_spectrum():
    unknown = MatrixOperator(A.to_dense())
    row = row_of(copies, unknown)
    assert (row.ghosts, row.missed) == (1, None)
    assert "copies of others" in row.remarks


def test_an_answer_that_admits_its_error_claims_nothing_false():
    def honest(A, request):
        admitted = torch.full((K,), 1.1e-3), torch.zeros(K, dtype=torch.bool)
        return Answer(EXACT + 1e-3, X, *admitted)

    row = row_of(honest)
    assert row.verdict == "not reached"
    assert row.residual == pytest.approx(1e-3 / float(EXACT[-1]), rel=0.01)


def raises(A, request):
    raise ZeroDivisionError("first line\nsecond line")


def too_few(A, request):
    return EXACT[:2], X[:, :2]


def none_at_all(A, request):
    return EXACT[:0], X[:, :0]


@pytest.mark.parametrize(
    ("solver", "reason"),
    [
        (raises, "ZeroDivisionError: first line"),
        (lambda A, r: (EXACT * torch.nan, X), "NonFiniteError: NaN or infinity in the eigenvalues"),
        (lambda A, r: (EXACT, X / 0), "NonFiniteError: NaN or infinity in the eigenvectors"),
        (lambda A, r: (EXACT, X.T), r"VectorError: expected eigenvectors as columns \(60, 4\)"),
        (lambda A, r: EXACT, "VectorError: expected a solver to return"),
        (lambda A, r: None, "got NoneType"),
        (lambda A, r: ("three", X), "VectorError: expected numbers, got str"),
        (too_few, "^2 of 4 pairs$"),
        (none_at_all, "^0 of 4 pairs$"),
        (lambda A, r: (EXACT, X * torch.tensor([1, 0, 1, 1])), "1 of 4 eigenvectors are zero"),
        (lambda A, r: Answer(EXACT, X, EXACT[:2]), "expected residuals of 4 pairs, got 2"),
        (lambda A, r: Answer(EXACT, X, converged=True), "expected converged of 4 pairs, got 1"),
        (lambda A, r: A @ X[:3], "VectorError: "),
    ],
)
def test_a_failure_is_a_row_with_its_reason(solver, reason):
    row = row_of(solver)
    assert row.verdict == "failed"
    assert re.search(reason, row.failure), row.failure
    assert "second line" not in row.remarks


def test_failures_of_some_seeds_are_counted():
    def fails_for_one(A, request):
        if request.seed == 1:
            raise ArithmeticError("bad luck")
        return EXACT, X

    row = row_of(fails_for_one, seeds=3)
    assert row.verdict == "failed"
    assert row.remarks == "ArithmeticError: bad luck (1 of 3 seeds)"


def test_ctrl_c_returns_the_rows_there_are():
    def interrupted(A, request):
        raise KeyboardInterrupt

    found = compare(A, K, solvers=[exact, interrupted], seeds=1, memory=False, histories=False)
    assert [row.solver for row in found.rows] == ["exact"]
    assert "interrupted" in found.warnings[0]


def test_ctrl_c_before_the_first_row_is_ctrl_c():
    def interrupted(A, request):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(A, K, solvers=[interrupted], seeds=1, memory=False, histories=False)


def test_warnings_of_a_solver_are_kept_and_not_raised():
    def warns(A, request):
        warnings.warn("half way", stacklevel=1)
        return EXACT + 1e-3, X

    row = row_of(warns)
    assert row.warnings == ("half way",)
    assert row.remarks == "says: half way"


def test_an_asymmetric_matrix_is_refused_for_symmetric_solvers():
    B = torch.triu(torch.randn(N, N, dtype=torch.float64))
    with pytest.raises(SymmetryError, match=r"the matrix is not symmetric: .* symmetric=False"):
        compare(B, K, solvers=[exact])


def test_an_asymmetric_matrix_is_for_those_who_take_it():
    B = torch.triu(torch.randn(N, N, dtype=torch.float64))
    taken = "for any matrix"

    @eigensolver(taken, symmetric=False)
    def general(A, request):
        values, vectors = torch.linalg.eig(A.to_dense())
        order = values.real.argsort(descending=True)[: request.k]
        return values[order], vectors[:, order]

    try:
        found = compare(
            B, K, solvers=[taken, "torchlinop lanczos"], seeds=1, memory=False, histories=False
        )
    finally:
        eigensolver.remove(taken)
    assert found.row(taken).verdict == "ok"
    assert "the matrix is not symmetric" in found.row("torchlinop lanczos").failure


def test_a_matrix_of_nan_is_refused():
    with pytest.raises(NonFiniteError, match="nothing to compare"):
        compare(torch.full((N, N), torch.nan), K)


def test_a_matrix_that_changes_is_said_to():
    def noisy(v):
        return A.matvec(v) + 1e-3 * torch.randn_like(v)

    found = compare(
        LambdaOperator(N, noisy, dtype=torch.float64), K, solvers=["torchlinop lanczos"],
        seeds=1, memory=False, histories=False,
    )  # fmt: skip
    assert "two products of one vector differ by" in " ".join(found.warnings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solvers": ["nope"]}, "unknown eigensolver 'nope'; known: torchlinop lanczos, "),
        ({"solvers": [3]}, "expected the name of an eigensolver or a function, got 3"),
        ({"solvers": []}, "no eigensolver is left to compare"),
        ({"which": "BE"}, "unknown which 'BE'; choose one of LA, SA, LM"),
        ({"tol": 2.0}, "expected tol from 0 to 1"),
        ({"budget": 3}, "budget to be at least k"),
        ({"seconds": 0}, "expected k and seconds to be positive"),
        ({"seeds": 0}, "expected at least one seed, got 0"),
        ({"k": N}, "expected k below n = 60"),
        ({"truth": "exact"}, 'expected truth to be eigenvalues or "dense"'),
        ({"truth": torch.ones(N + 1)}, "expected at most 60 true eigenvalues"),
        ({"truth": torch.full((N,), torch.nan)}, "or NaN in it; pass a vector"),
        ({"truth": {"B": "dense"}}, "expected truth by the names of problems, '', got 'B'"),
        ({"seeds": [3, -1]}, r"expected seeds from 0 to 2\*\*32 - 1, got \[3, -1\]"),
    ],
)
def test_a_bad_question_is_refused(options, message):
    with pytest.raises(OptionError, match=message):
        compare(A, **{"k": K, **options})


BUILDS = "expected an operator, or a function without arguments that builds one, got "


@pytest.mark.parametrize(
    ("problems", "message"),
    [
        ({}, "expected at least one problem, got an empty mapping"),
        ("A", "expected an operator, got str"),
        (3, "expected an operator, got int"),
        (torch.nn.Linear(2, 2), BUILDS + "Linear"),
        (lambda v: 2 * v, BUILDS + r"function; .* LambdaOperator\(n, product\)"),
    ],
)
def test_what_is_no_problem_is_refused(problems, message):
    with pytest.raises(OptionError, match=message):
        compare(problems)


def test_a_name_of_ours_is_not_given_away():
    with pytest.raises(OptionError, match="is the name of an eigensolver of torchlinop"):
        eigensolver("torchlinop lanczos")(exact)
