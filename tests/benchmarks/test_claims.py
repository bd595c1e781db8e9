"""The judge of solvers finds what is wrong with answers that are wrong by construction."""

import pytest
import torch
from eigen_measures import false_claims, judge
from eigen_requests import Answer, Request
from solver_problems import Matrix

LAMBDA = torch.tensor([4.0, 3.0, 3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
A = Matrix("diagonal", lambda V: LAMBDA[:, None] * V, LAMBDA)
REQUEST = Request(k=3, tol=1e-6)


def answer(indices, *, values=None, residual=0.0, converged=True, bounds=None):
    """Unit vectors with these indices as eigenvectors."""
    X = torch.eye(6, dtype=torch.float64)[:, indices]
    values = LAMBDA[indices] if values is None else torch.tensor(values, dtype=torch.float64)
    like = torch.ones(3, dtype=torch.float64)
    return Answer(
        values,
        X,
        residual * like,
        torch.full((3,), converged),
        None if bounds is None else bounds * like,
    )


def claims_of(found):
    X, values = found.eigenvectors, found.eigenvalues
    residuals = (A.product(X) - X * values).norm(dim=0)
    return "; ".join(false_claims(A, found, residuals, REQUEST))


def test_the_right_answer_makes_no_false_claim_and_has_no_error():
    found = answer([0, 1, 2], bounds=1e-9)
    judged = judge(A, found, REQUEST)
    assert judged.false == ()
    assert judged.error == judged.residual == 0
    assert judged.converged == 3


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (answer([0, 1, 2], values=[4.1, 3, 3], residual=0.01), "is claimed to be 1e-02"),
        (answer([0, 1, 2], values=[4.1, 3, 3], residual=0.1), "called converged is not"),
        (answer([0, 0, 1]), "1 of the values called converged are copies"),
        (answer([0, 1, 3]), "largest eigenvalues are missing"),
        (
            answer([0, 1, 2], values=[4.1, 3, 3], residual=0.1, converged=False, bounds=0.01),
            "1e-01 away, not 1e-02",
        ),
    ],
)
def test_a_false_claim_is_found(found, reason):
    assert reason in claims_of(found)


def test_an_answer_that_admits_its_error_claims_nothing_false():
    found = answer([0, 0, 3], values=[4.1, 4, 2], residual=0.11, converged=False)
    assert claims_of(found) == ""
    assert judge(A, found, REQUEST).error == pytest.approx(1 / 3)
