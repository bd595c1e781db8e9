"""Ctrl-C and the end of the time leave what one run with the products taken would have found."""

import math

import pytest
import torch

from torchlinop import LambdaOperator, MatrixOperator
from torchlinop.algorithms.diagonal import diagonal
from torchlinop.algorithms.extremal import condition_number, extremal_eigenvalues
from torchlinop.algorithms.norms import norm
from torchlinop.algorithms.trace import trace
from torchlinop.errors import MemoryEstimateError, NotConvergedError, NotConvergedWarning
from torchlinop.testing import spectra
from torchlinop.testing.gallery import with_spectrum

A = with_spectrum(spectra.polynomial(300))[0]


def failing(at, error):
    """An operator that raises in the call that takes product ``at``."""
    count = 0

    def product(V):
        nonlocal count
        count += 1 if V.ndim == 1 else V.shape[1]
        if count >= at:
            raise error
        return A @ V

    return LambdaOperator(300, product, matmat=product, dtype=torch.float64)


def interrupted(call, at):
    with pytest.warns(NotConvergedWarning, match=r"^interrupted after \d+ of"):
        return call(failing(at, KeyboardInterrupt()), 200)


def out_of_time(call, granted):
    """By a time that is over with the first product."""
    with pytest.warns(NotConvergedWarning, match=r"out of time after \d+ of"):
        return call(MatrixOperator(A), granted, max_seconds=1e-9)


def tracing(method):
    return lambda op, m, **options: trace(op, m, method=method, **options)


def diagonal_by(method):
    return lambda op, m, **options: diagonal(op, m, method=method, **options)


def norm_of(ord):
    return lambda op, m, **options: norm(op, ord, num_matvecs=m, **options)


TRACES = ["hutchinson", "hutch++", "na-hutch++", "xtrace", "xnystrace"]


# The first products of which there is an estimate, and what is left of 200 interrupted in 101.
@pytest.mark.parametrize(
    ("method", "left"),
    [("hutchinson", 96), ("na-hutch++", 64), ("xtrace", 96), ("xnystrace", 96)],
)
def test_an_interrupted_trace_is_that_of_the_products_taken(method, left):
    result = interrupted(tracing(method), 101)
    as_granted = trace(MatrixOperator(A), left, method=method)
    assert result.estimate == pytest.approx(as_granted.estimate, rel=1e-9)
    assert result.stderr == pytest.approx(as_granted.stderr, rel=1e-6)
    assert left <= result.matvecs <= 100
    assert not result.converged
    assert "interrupted after" in repr(result)


def test_hutch_plus_plus_interrupted_among_its_sketches_is_within_its_error_bar():
    for at in range(66, 130, 7):
        result = interrupted(tracing("hutch++"), at)
        assert abs(result.estimate - float(A.trace())) < 5 * result.stderr


@pytest.mark.parametrize("method", TRACES)
def test_a_trace_without_an_estimate_passes_the_interrupt_on(method):
    with pytest.raises(KeyboardInterrupt):
        trace(failing(3, KeyboardInterrupt()), 200, method=method)


@pytest.mark.parametrize("method", TRACES)
def test_a_trace_that_is_out_of_time_is_that_of_the_products_taken(method):
    result = out_of_time(tracing(method), 200)
    assert result.matvecs <= 32
    as_granted = trace(MatrixOperator(A), result.matvecs, method=method)
    assert result.estimate == pytest.approx(as_granted.estimate, rel=1e-9)


def test_an_accuracy_that_is_not_reached_in_time_is_not_claimed():
    with pytest.warns(NotConvergedWarning) as warned:
        result = trace(MatrixOperator(A), rtol=1e-9, method="hutchinson", max_seconds=1e-9)
    assert not result.converged
    assert [str(w.message)[:18] for w in warned] == ["out of time after ", "after 16 products,"]


def test_an_exact_trace_interrupted_is_the_estimate_before_it():
    with pytest.warns(NotConvergedWarning) as warned:
        result = trace(failing(550, KeyboardInterrupt()), 1000, rtol=1e-9, method="hutchinson")
    before = trace(MatrixOperator(A), 256, method="hutchinson")
    assert result.estimate == pytest.approx(before.estimate, rel=1e-12)
    assert result.method == "hutchinson"
    assert str(warned[0].message) == "interrupted after 544 of 1000 products"


@pytest.mark.parametrize(("method", "left"), [("xdiag", 96), ("hutchinson", 96)])
def test_an_interrupted_diagonal_is_that_of_the_products_taken(method, left):
    result = interrupted(diagonal_by(method), 101)
    as_granted = diagonal(MatrixOperator(A), left, method=method)
    torch.testing.assert_close(result.estimate, as_granted.estimate, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result.stderr, as_granted.stderr, rtol=1e-6, atol=1e-12)
    assert "interrupted after" in repr(result)


def test_interrupted_ends_are_those_of_the_steps_taken():
    result = interrupted(extremal_eigenvalues, 13)
    as_granted = extremal_eigenvalues(MatrixOperator(A), 12)
    assert result.matvecs == 12
    assert tuple(result) == tuple(as_granted)
    assert result.largest_bound == as_granted.largest_bound


@pytest.mark.parametrize("ord", [2, "fro"])
def test_an_interrupted_norm_is_within_its_bounds(ord):
    result = interrupted(norm_of(ord), 180)
    truth = {2: 1.0, "fro": float(A.norm())}[ord]
    assert result.lower * (1 - 1e-12) <= truth <= result.upper * (1 + 1e-12)
    assert result.warnings


@pytest.mark.parametrize(
    "call",
    [
        diagonal_by("xdiag"), diagonal_by("hutchinson"), extremal_eigenvalues, condition_number,
        norm_of(2), norm_of("fro"), norm_of("nuc"),
    ],
)  # fmt: skip
def test_time_ends_runs_and_their_results_say_so(call):
    result = out_of_time(call, 200)
    assert 0 < result.matvecs <= 48
    assert "out of time" in repr(result)


@pytest.mark.parametrize("call", [trace, diagonal, norm_of("fro"), norm_of("nuc")])
def test_an_exact_answer_that_is_out_of_time_is_none(call):
    with pytest.raises(NotConvergedError, match=r"before the 300 products of an exact answer .*"):
        call(MatrixOperator(A), 300, max_seconds=1e-9)


@pytest.mark.parametrize(
    "call",
    [trace, diagonal, extremal_eigenvalues, condition_number, norm_of("fro"), norm_of("nuc")],
)
def test_running_out_of_memory_is_named(call):
    with pytest.raises(MemoryEstimateError, match=r"memory on cpu ran out in product \d+ of"):
        call(failing(2, torch.OutOfMemoryError("CUDA out of memory")), 100)


def test_without_limits_nothing_is_said():
    result = trace(MatrixOperator(A), 100, max_seconds=math.inf, progress=True)
    assert result.converged
    assert not result.warnings
