"""Estimators of traces and densities, and linear solvers, in the same kind of table."""

import math
import re

import pytest
import torch

from torchlinop.compare import (
    DensityAnswer,
    Solution,
    compare_densities,
    compare_solves,
    compare_traces,
)
from torchlinop.errors import OptionError, VectorError
from torchlinop.testing import RotatedOperator, spectra

A = RotatedOperator(spectra.polynomial(100, -1.0))
TRACE = float(A.eigenvalues.sum())


def trace_row(estimator, **options):
    return compare_traces(A, 20, [estimator], **{"seeds": 12, "histories": False, **options}).rows[
        0
    ]


def test_the_right_trace_has_no_error():
    row = trace_row(lambda A, request: (TRACE, 0.0))
    assert (row.error, row.coverage, row.verdict) == (0, 1, "ok")


def test_errors_are_root_mean_squares_of_all_seeds():
    row = trace_row(lambda A, request: TRACE * (1 + 0.1 * (-1) ** request.seed))
    assert row.error == pytest.approx(0.1)
    assert row.bias == pytest.approx(0, abs=1e-9)
    assert math.isnan(row.coverage)


def test_error_bars_that_are_too_short_are_a_false_claim():
    row = trace_row(lambda A, request: (TRACE * (1 + 0.1 * (-1) ** request.seed), 1e-3))
    assert row.verdict == "false claim"
    assert "two standard errors cover 0% of the errors" in row.remarks


@pytest.mark.parametrize(
    ("estimator", "reason"),
    [
        (lambda A, request: math.nan, "NonFiniteError: the estimate is nan"),
        (lambda A, request: (1, 2, 3), r"VectorError: expected an estimate, or"),
        (lambda A, request: float((A @ torch.eye(100, dtype=torch.float64)).trace()), "^budget"),
        (lambda A, request: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_trace_that_fails_is_a_row_with_its_reason(estimator, reason):
    assert re.search(reason, trace_row(estimator).failure)


def test_estimators_of_low_rank_sketches_beat_hutchinson_on_a_decaying_spectrum():
    found = compare_traces(A, 40, ["torchlinop*"], seeds=20)
    errors = {row.solver: row.error for row in found.rows}
    assert errors["torchlinop xtrace"] < 0.5 * errors["torchlinop hutchinson"]
    assert errors["torchlinop hutch++"] < 0.5 * errors["torchlinop hutchinson"]
    assert [row.products.most <= 40 for row in found.rows] == [True] * 3
    history = found.histories[-1]
    assert history.values[-1] < history.values[0]


def test_estimators_of_other_libraries_spend_what_they_are_granted():
    pytest.importorskip("curvlinops")
    found = compare_traces(A, 30, ["curvlinops*"], seeds=5, histories=False)
    assert [row.failure for row in found.rows] == ["", "", ""]
    assert {row.products.most for row in found.rows} == {30}


def test_a_quadrature_that_is_the_spectrum_has_distance_zero():
    def exact(A, request):
        return A.operator.eigenvalues, torch.ones(100)

    def one_node(A, request):
        return DensityAnswer(A.operator.eigenvalues[:1], torch.ones(1))

    found = compare_densities(A, 2, 10, [exact, one_node], seeds=1, histories=False)
    right, wrong = found.rows
    assert right.quadrature == pytest.approx(0, abs=1e-12)
    span = float(A.eigenvalues[0] - A.eigenvalues[-1])
    expected = float((A.eigenvalues[0] - A.eigenvalues).mean()) / span
    assert wrong.quadrature == pytest.approx(expected)


@pytest.mark.parametrize(
    ("estimator", "reason"),
    [
        (lambda A, request: (torch.ones(3), torch.ones(2)), "VectorError: expected a weight"),
        (
            lambda A, request: (torch.ones(2) / 0, torch.ones(2)),
            "NonFiniteError: NaN or infinity in the nodes or weights",
        ),
        (lambda A, request: 3, "TypeError"),
        (lambda A, request: (torch.ones(2), torch.zeros(2)), "VectorError: expected weights of at"),
        (lambda A, request: (torch.ones(2), -torch.ones(2)), "VectorError: expected weights of at"),
        (
            lambda A, request: DensityAnswer(*torch.ones(3, 2), torch.ones(3)),
            "VectorError: expected a positive density",
        ),
    ],
)
def test_a_density_that_fails_is_a_row_with_its_reason(estimator, reason):
    row = compare_densities(A, 2, 5, [estimator], seeds=1, histories=False).rows[0]
    assert row.failure.startswith(reason)


def test_densities_of_all_libraries_take_the_same_products():
    found = compare_densities(A, 3, 20, seeds=2)
    there = [row for row in found.rows if not row.failures]
    assert {row.products.median for row in there} == {60}
    assert there[0].quadrature < 0.02
    assert found.histories[0].values[-1] < found.histories[0].values[0]


def solve_row(solver, **options):
    return compare_solves(
        A, solvers=[solver], **{"seeds": 1, "histories": False, "damping": 0.1, **options}
    ).rows[0]


def test_the_right_solution_has_no_residual():
    inverse = torch.linalg.inv(A.to_dense() + 0.1 * torch.eye(100, dtype=torch.float64))
    row = solve_row(lambda A, request: inverse @ request.b)
    assert row.residual < 1e-13
    assert row.verdict == "ok"


def test_solutions_that_are_called_so_and_are_not_are_false_claims():
    row = solve_row(lambda A, request: Solution(request.b, residual=1e-9, converged=True))
    assert row.verdict == "false claim"
    assert "is claimed to be 1e-09" in row.remarks
    assert "called converged with a residual of" in row.remarks


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_claims_are_held_to_the_same_whatever_the_scale_of_b(scale):
    b = scale * torch.ones(100, dtype=torch.float64)
    inverse = torch.linalg.inv(A.to_dense() + 0.1 * torch.eye(100, dtype=torch.float64))

    def right(A, request):
        return Solution(inverse @ request.b, residual=1e-16, converged=True)

    def lies(A, request):
        return Solution((1 + 1e-9) * inverse @ request.b, residual=1e-11)

    assert [solve_row(solver, b=b).verdict for solver in (right, lies)] == ["ok", "false claim"]


@pytest.mark.parametrize(
    ("solver", "reason"),
    [
        (lambda A, request: request.b[:5], r"VectorError: expected x of shape \(100,\), got \(5,"),
        (lambda A, request: request.b / 0, "NonFiniteError: NaN or infinity in x"),
        (lambda A, request: [A @ request.b for _ in range(200)], "budget spent: 30 products"),
    ],
)
def test_a_solve_that_fails_is_a_row_with_its_reason(solver, reason):
    assert re.search(reason, solve_row(solver, budget=30).failure)


def test_our_solvers_and_those_of_scipy_reach_the_residual_asked_for():
    found = compare_solves(A, damping=0.1, solvers=["torchlinop*", "scipy cg"], seeds=2)
    assert [row.verdict for row in found.rows] == ["ok"] * 3
    for history in found.histories:
        assert history.values[-1] < 1e-5 < history.values[0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: compare_traces(A, 2), OptionError, "num_matvecs to be at least 4"),
        (lambda: compare_traces(A, 20, ["nope"]), OptionError, "unknown trace estimator 'nope'"),
        (lambda: compare_densities(A, 0), OptionError, "one probe and two steps"),
        (lambda: compare_densities(A, 1, 2, ["nope"]), OptionError, "unknown density estimator"),
        (lambda: compare_solves(A, rtol=0), OptionError, "rtol from 0 to 1"),
        (lambda: compare_solves(A, torch.ones(3)), VectorError, r"expected b of shape \(100,\)"),
        (lambda: compare_solves(A, torch.zeros(100)), VectorError, "a finite b that is not 0"),
        (lambda: compare_solves(A, solvers=["nope"]), OptionError, "unknown linear solver 'nope'"),
    ],
)
def test_a_bad_question_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
