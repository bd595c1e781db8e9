"""Solvers without end are rows that say so, with as many products and seconds as were granted."""

import threading
import time

import pytest
import torch

from torchlinop.compare import (
    compare,
    compare_densities,
    compare_solves,
    compare_traces,
)
from torchlinop.compare.attempt import attempt
from torchlinop.compare.timed_operator import TimedOperator
from torchlinop.errors import ProductBudgetError
from torchlinop.testing import RotatedOperator, spectra

N, K = 60, 4
A = RotatedOperator(spectra.polynomial(N, -1.0), seed=3)
EXACT = A.eigenvalues[:K]
X = A.eigenvectors(torch.arange(K))


def row_of(solver, **options):
    options = {"k": K, "seeds": 1, "histories": False, "memory": False, **options}
    return compare(A, solvers=[solver], **options).rows[0]


def endless(A, request):
    v = request.start(A)[:, 0]
    while True:
        v = A @ v


def endless_and_deaf(A, request):
    """It takes a refusal for one bad product."""
    v = request.start(A)[:, 0]
    while True:
        try:
            v = A @ v
        except ProductBudgetError:
            continue


@pytest.mark.parametrize("solver", [endless, endless_and_deaf])
def test_a_solver_that_never_ends_spends_its_budget_and_no_more(solver):
    row = row_of(solver, budget=37)
    assert row.failure == "budget spent: 37 products"
    assert row.products.median == 37


def test_a_solver_that_never_ends_is_out_of_time():
    started = time.perf_counter()
    row = row_of(endless, budget=10**9, seconds=0.05)
    assert row.failure == "out of time: 0.05 s"
    assert time.perf_counter() - started < 30


def test_a_solver_is_told_what_was_refused():
    B = TimedOperator(A, budget=5)
    B @ X
    message = "budget spent: 5 products, and 4 more asked for after 4; raise budget or seconds"
    with pytest.raises(ProductBudgetError, match=message):
        B @ X


def test_a_budget_of_less_than_an_iteration_of_lobpcg_is_a_row():
    row = row_of("scipy lobpcg", budget=K)
    assert row.failure == "ValueError: a budget of 4 products is less than one iteration"


def test_a_block_beyond_the_budget_is_refused_whole():
    row = row_of(lambda A, r: A @ r.start(A, 50), budget=49)
    assert row.failure.startswith("budget spent")
    assert row.products.median == 0


def test_an_answer_after_a_refused_product_counts():
    def best_so_far(A, request):
        try:
            endless(A, request)
        except ProductBudgetError:
            return EXACT, X

    assert row_of(best_so_far, budget=20).verdict == "ok"


def loops(A, request):
    while True:
        sum(range(100))


def loops_and_catches_all(A, request):
    try:
        loops(A, request)
    except BaseException:
        loops(A, request)


def loops_after_products(A, request):
    A @ request.start(A, 3)
    loops(A, request)


def loops_after_a_refused_product(A, request):
    try:
        endless(A, request)
    except ProductBudgetError:
        loops(A, request)


def sleeps(A, request):
    """It is interrupted when it wakes up."""
    time.sleep(0.2)
    return EXACT, X


@pytest.mark.parametrize(
    ("solver", "products"),
    [
        (loops, 0),
        (loops_and_catches_all, 0),
        (loops_after_products, 3),
        (loops_after_a_refused_product, 37),
        (sleeps, 0),
    ],
)
def test_a_solver_that_hangs_without_products_is_interrupted(solver, products):
    row = row_of(solver, budget=37, seconds=0.1)
    assert row.verdict == "failed"
    assert row.failure == "out of time: no product and no answer for 0.1 s"
    assert row.products.median == products


def test_a_solver_that_hangs_is_not_run_again_for_its_memory_and_history():
    calls = []

    def hangs(A, request):
        calls.append(request.seed)
        loops(A, request)

    row_of(hangs, seconds=0.05, seeds=2, histories=True, memory=True)
    assert calls == [0, 1]


def test_a_slow_product_is_no_hang():
    class Slow(type(A)):
        def _matmat(self, V):
            time.sleep(0.1)
            return super()._matmat(V)

    def patient(A, request):
        A @ X
        return EXACT, X

    B = Slow(spectra.polynomial(N, -1.0), seed=3)
    found = compare(B, K, solvers=[patient], seconds=0.05, seeds=1, memory=False, histories=False)
    assert found.rows[0].verdict == "ok"


@pytest.mark.parametrize(
    "comparison",
    [
        lambda: compare_traces(A, 20, [loops], seconds=0.05, seeds=1),
        lambda: compare_densities(A, 2, 5, [loops], seconds=0.05, seeds=1),
        lambda: compare_solves(A, None, [loops], seconds=0.05, seeds=1),
    ],
    ids=["traces", "densities", "solves"],
)
def test_estimators_that_hang_are_interrupted_too(comparison):
    assert comparison().rows[0].failure.startswith("out of time: no product and no answer")


def test_no_interruption_comes_after_the_run_that_it_is_for():
    threads = threading.active_count()
    for i in range(200):
        wait = 0.0019 + 0.0001 * (i % 4)
        started = time.perf_counter()

        def ends_about_then():
            while time.perf_counter() - started < wait:  # noqa: B023
                pass

        attempt(ends_about_then, TimedOperator(A, seconds=0.002), 0)
    sum(range(100_000))
    assert threading.active_count() == threads


def test_without_a_limit_no_thread_watches():
    seen = []
    attempt(lambda: seen.append(threading.active_count()), TimedOperator(A), 0)
    assert seen == [threading.active_count()]
