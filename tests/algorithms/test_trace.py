"""Traces are within their error bars, exact where they can be, and cost what was granted."""

import functools
import math

import numpy as np
import pytest
import torch

from torchlinop import (
    CountingOperator,
    HessianOperator,
    LambdaOperator,
    MatrixOperator,
    from_linear_operator,
)
from torchlinop.algorithms import trace_method
from torchlinop.algorithms.trace import hutch_plus_plus, hutchinson, trace, xnystrace, xtrace
from torchlinop.algorithms.trace_result import TraceResult
from torchlinop.errors import (
    MemoryEstimateError,
    NonFiniteError,
    NotConvergedWarning,
    OptionError,
)
from torchlinop.testing import gallery, spectra
from torchlinop.testing.gallery import with_spectrum
from torchlinop.testing.oracles import dense_hessian

METHODS = ["hutchinson", "hutch++", "na-hutch++", "xtrace", "xnystrace"]
SPECTRA = {
    "flat": spectra.flat(1000),
    "poly": spectra.polynomial(1000),
    "slowexp": spectra.exponential(1000, 0.9),
    "fastexp": spectra.exponential(1000, 0.7),
    "step": spectra.step(1000),
    "neural": spectra.neural(1000),
}


def decaying(n=200):
    return MatrixOperator(with_spectrum(spectra.polynomial(n))[0])


@functools.cache
def rotated(name):
    """A matrix with this spectrum."""
    return MatrixOperator(with_spectrum(SPECTRA[name])[0])


@functools.cache
def result_of(spectrum, num_matvecs, method, seed):
    """Several tests ask something of the same runs."""
    return trace(rotated(spectrum), num_matvecs, method=method, seed=seed)


# Mean of |error| / Σ|λ| over 200 trials, n = 1000, of an implementation that shares no code with
# this one. Those of 30 trials scatter by a seventh.
PUBLISHED = [
    ("flat", "hutchinson", 60, 1.3e-3),
    ("flat", "hutch++", 24, 3.7e-3),
    ("flat", "xtrace", 60, 2.0e-3),
    ("flat", "xnystrace", 24, 2.0e-3),
    ("poly", "hutchinson", 60, 9.3e-2),
    ("poly", "hutch++", 60, 1.5e-3),
    ("poly", "na-hutch++", 60, 4.2e-3),
    ("poly", "xtrace", 60, 8.4e-4),
    ("poly", "xnystrace", 24, 4.1e-3),
    ("slowexp", "hutch++", 60, 1.3e-2),
    ("slowexp", "xtrace", 60, 5.8e-3),
    ("slowexp", "xnystrace", 24, 2.3e-2),
    ("fastexp", "hutch++", 60, 1.8e-4),
    ("fastexp", "xtrace", 60, 7.2e-6),
    ("step", "hutch++", 60, 2.8e-2),
    ("step", "xtrace", 60, 2.8e-2),
    ("step", "xnystrace", 60, 1.6e-7),
    ("neural", "hutchinson", 60, 1.0e-2),
    ("neural", "hutch++", 60, 8.6e-3),
    ("neural", "xtrace", 60, 6.4e-3),
]


@pytest.mark.parametrize(("spectrum", "method", "num_matvecs", "published"), PUBLISHED)
def test_errors_are_those_of_the_literature_and_within_error_bars(
    spectrum, method, num_matvecs, published
):
    truth = float(SPECTRA[spectrum].sum())
    results = [result_of(spectrum, num_matvecs, method, seed) for seed in range(30)]
    errors = np.array([result.estimate - truth for result in results])
    stderrs = np.array([result.stderr for result in results])
    mean = np.abs(errors).mean() / float(SPECTRA[spectrum].abs().sum())
    assert 1 / 1.4 < mean / published < 1.4
    assert abs(errors.mean()) < 4 * errors.std(ddof=1) / 30**0.5
    assert (np.abs(errors) <= 2 * stderrs).mean() >= 0.8  # of a coverage of 0.88 or more


@pytest.mark.parametrize(
    ("method", "most"), [("hutchinson", 0.995), ("hutch++", 0.995), ("xtrace", 1.0)]
)
def test_two_standard_errors_cover_the_truth_in_nine_tenths_of_cases(method, most):
    A = with_spectrum(spectra.neural(300))[0]
    op, truth = MatrixOperator(A), float(A.trace())
    results = [trace(op, 32, method=method, seed=seed) for seed in range(200)]
    covered = [abs(result.estimate - truth) <= 2 * result.stderr for result in results]
    assert 0.88 <= np.mean(covered) <= most


@pytest.mark.parametrize("spectrum", ["poly", "slowexp", "fastexp", "neural"])
def test_xtrace_is_better_than_hutch_plus_plus_is_better_than_hutchinson(spectrum):
    truth = float(SPECTRA[spectrum].sum())
    errors = [
        np.mean([abs(result_of(spectrum, 60, m, s).estimate - truth) for s in range(20)])
        for m in ("xtrace", "hutch++", "hutchinson")
    ]
    assert errors == sorted(errors)


def test_errors_of_hutch_plus_plus_fall_with_the_products_and_of_hutchinson_with_their_root():
    truth = float(SPECTRA["poly"].sum())

    def slope(method):
        errors = [
            np.mean([abs(result_of("poly", m, method, s).estimate - truth) for s in range(20)])
            for m in (24, 120)
        ]
        return math.log(errors[1] / errors[0]) / math.log(120 / 24)

    assert slope("hutchinson") == pytest.approx(-0.5, abs=0.25)
    assert slope("hutch++") < -1.5


@pytest.mark.parametrize(
    ("distribution", "variance"),
    [
        ("rademacher", lambda A: 2 * (A.square().sum() - A.diagonal().square().sum())),
        ("gaussian", lambda A: 2 * A.square().sum()),
        ("sphere", lambda A: 2 * len(A) / (len(A) + 2) * (A.square().sum() - A.trace() ** 2 / 9)),
    ],
)
def test_samples_have_the_variance_of_their_distribution(distribution, variance):
    A = with_spectrum(torch.linspace(-1, 3, 9, dtype=torch.float64))[0]
    probes = LambdaOperator(9, lambda v: v, dtype=torch.float64).space
    Omega = probes.random(20_000, 0, distribution)
    samples = (Omega * (A @ Omega)).sum(0)
    assert float(samples.var() / variance(A)) == pytest.approx(1, abs=0.06)
    few = hutchinson(MatrixOperator(A), 8, distribution=distribution)
    assert few.stderr == pytest.approx(float(few.samples.std() / 8**0.5), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [1, 8])
def test_hutch_plus_plus_is_exact_if_the_rank_is_at_most_that_of_the_sketch(rank, dtype):
    eigenvalues = torch.zeros(120, dtype=torch.float64)
    eigenvalues[:rank] = torch.linspace(-3, 1, rank + 1, dtype=torch.float64)[:-1]
    A = with_spectrum(eigenvalues)[0].to(dtype)
    result = hutch_plus_plus(MatrixOperator(A), 24)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert result.estimate == pytest.approx(float(eigenvalues.sum()), rel=tolerance)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_matvecs", [30, 1000])
def test_the_trace_is_exact_if_as_many_products_as_rows_are_granted(method, num_matvecs):
    op = CountingOperator(MatrixOperator(with_spectrum(spectra.neural(30))[0]))
    result = trace(op, num_matvecs, method=method)
    assert result.estimate == pytest.approx(float(spectra.neural(30).sum()), rel=1e-13)
    assert (result.method, result.stderr) == ("exact", 0)
    assert op.matvecs == result.matvecs == 30


@pytest.mark.parametrize("num_matvecs", [1, 2, 3, 4, 5, 17, 32, 99])
@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_all_products_that_are_granted_are_spent(method, num_matvecs):
    op = CountingOperator(decaying())
    result = trace(op, num_matvecs, method=method)
    assert op.matvecs == result.matvecs == result.num_matvecs == num_matvecs
    assert math.isinf(result.stderr) == (num_matvecs == 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rank", "num_matvecs"), [(1, 10), (5, 24)])
def test_na_hutch_plus_plus_is_exact_beyond_the_rank(rank, num_matvecs, dtype):
    A = with_spectrum(spectra.low_rank(200, rank))[0].to(dtype)
    errors = [
        trace(MatrixOperator(A), num_matvecs, method="na-hutch++", seed=seed).estimate
        - float(A.double().trace())
        for seed in range(40)
    ]
    assert np.abs(errors).max() < 100 * rank * torch.finfo(dtype).eps


@pytest.mark.parametrize("method", ["hutch++", "na-hutch++", "xtrace"])
def test_rounding_is_relative_to_eigenvalues_even_where_they_cancel(method):
    eigenvalues = torch.zeros(200, dtype=torch.float64)
    eigenvalues[:10] = torch.tensor([5, 4, 3, 2, 1, -1, -2, -3, -4, -5])
    A = with_spectrum(eigenvalues)[0].float()
    results = [trace(MatrixOperator(A), 60, method=method, seed=seed) for seed in range(40)]
    truth = float(A.double().trace())
    assert np.mean([abs(r.estimate - truth) <= 2 * r.stderr for r in results]) >= 0.95
    assert max(r.stderr for r in results) < 30 * 20 * torch.finfo(A.dtype).eps


@pytest.mark.parametrize("num_matvecs", [8, 17, 23, 99])
def test_na_hutch_plus_plus_spends_all_products(num_matvecs):
    op = CountingOperator(decaying())
    assert trace(op, num_matvecs, method="na-hutch++").matvecs == op.matvecs == num_matvecs


@pytest.mark.parametrize("method", METHODS)
def test_products_are_doubled_until_the_accuracy_is_reached(method):
    op = CountingOperator(decaying(400))
    rtol = 0.3 if method == "hutchinson" else 0.01
    result = trace(op, rtol=rtol, method=method)
    assert result.converged
    assert 2 * result.stderr <= rtol * abs(result.estimate)
    assert result.matvecs == op.matvecs
    assert abs(result.estimate - float(spectra.polynomial(400).sum())) < 4 * result.stderr


@pytest.mark.parametrize("method", METHODS)
def test_products_of_earlier_rounds_are_used_again(method):
    """What was found in steps is what one run with as many products finds."""
    op = decaying(400)
    with pytest.warns(NotConvergedWarning, match="after 128 products"):
        in_steps = trace(op, 128, rtol=1e-12, method=method)
    at_once = trace(op, 128, method=method)
    assert in_steps.matvecs == at_once.matvecs
    assert in_steps.estimate == pytest.approx(at_once.estimate, rel=1e-9)
    assert in_steps.stderr == pytest.approx(at_once.stderr, rel=1e-6)


def test_few_rows_are_taken_one_by_one_if_probes_do_not_suffice():
    op = CountingOperator(decaying(50))
    result = trace(op, rtol=1e-9)
    assert result.method == "exact"
    assert result.converged
    assert result.matvecs == op.matvecs == 32 + 50


@pytest.mark.parametrize("cap", [20, 33, 45, 60])
@pytest.mark.parametrize("method", METHODS)
def test_no_more_products_are_taken_than_granted(method, cap):
    op = CountingOperator(decaying(60))
    with pytest.warns(NotConvergedWarning, match=r"rtol=1e-09 was asked for. Raise num_matvecs"):
        result = trace(op, cap, rtol=1e-9, method=method)
    assert op.matvecs == result.matvecs <= cap
    assert not result.converged
    assert "Raise num_matvecs or rtol" in repr(result)


@pytest.mark.parametrize("method", METHODS)
def test_results_depend_on_the_seed_and_not_on_the_width_of_products(method):
    A = with_spectrum(spectra.polynomial(100))[0]
    by_column = LambdaOperator(100, lambda v: A @ v, dtype=torch.float64)
    one, other = trace(MatrixOperator(A), 40, method=method), trace(by_column, 40, method=method)
    assert one.estimate == pytest.approx(other.estimate, rel=1e-12)
    assert trace(by_column, 40, method=method, seed=1).estimate != one.estimate


def test_seeds_have_no_probe_in_common():
    op = decaying()
    first, second = (hutchinson(op, 30, seed=seed).samples for seed in (0, 1))
    assert not torch.isin(first, second).any()


def test_a_hessian_has_the_trace_of_the_dense_one():
    p = gallery.mlp()
    H = HessianOperator(p.model, p.batches, p.loss_fn)
    truth = float(dense_hessian(p.full_loss, p.parameters).trace())
    assert trace(H, H.size).estimate == pytest.approx(truth, rel=1e-12)
    result = trace(H, 20)
    assert result.method == "xtrace"
    assert abs(result.estimate - truth) < 3 * result.stderr


def test_a_scipy_matrix_is_as_good_as_a_tensor():
    A = with_spectrum(spectra.polynomial(100))[0]
    from_scipy = trace(from_linear_operator(A.numpy()), 30)
    assert from_scipy.estimate == pytest.approx(trace(MatrixOperator(A), 30).estimate, rel=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_the_trace_of_a_hermitian_matrix_is_that_of_its_real_part(method):
    eigenvalues = spectra.polynomial(80).to(torch.complex128)
    U = torch.linalg.qr(torch.randn(80, 80, dtype=torch.complex128)).Q
    A = (U * eigenvalues) @ U.mH
    result = trace(MatrixOperator((A + A.mH) / 2), 40, method=method)
    assert abs(result.estimate - float(eigenvalues.real.sum())) < 4 * result.stderr
    assert result.dtype == torch.complex128


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_coarse_operators_are_as_accurate_as_their_products(method, dtype):
    A = with_spectrum(spectra.polynomial(200))[0]
    op = LambdaOperator(200, lambda v: (A @ v.double()).to(dtype), dtype=dtype)
    result = trace(op, 60, method=method)
    assert abs(result.estimate - float(A.trace())) < 4 * result.stderr
    assert result.stderr >= torch.finfo(dtype).eps * abs(result.estimate)


@pytest.mark.parametrize(
    ("function", "method"),
    [
        (hutchinson, "hutchinson"),
        (hutch_plus_plus, "hutch++"),
        (xtrace, "xtrace"),
        (xnystrace, "xnystrace"),
    ],
)
def test_methods_have_functions_of_their_own(function, method):
    one, other = function(decaying(), 30, seed=3), trace(decaying(), 30, method=method, seed=3)
    assert one.estimate == other.estimate
    assert one.method == method


def positive_semidefinite():
    op = decaying()
    op.positive_semidefinite = True
    return op


@pytest.mark.parametrize(
    ("num_matvecs", "vectors_that_fit", "method"),
    [(60, 300, "xnystrace"), (60, 200, "xtrace"), (15, 300, "hutchinson"), (200, 300, "exact")],
)
def test_xnystrace_is_taken_where_the_matrix_is_positive_semidefinite_by_construction(
    monkeypatch, num_matvecs, vectors_that_fit, method
):
    monkeypatch.setattr(trace_method, "free_bytes", lambda device: vectors_that_fit * 200 * 8)
    assert trace(positive_semidefinite(), num_matvecs).method == method


@pytest.mark.parametrize(
    ("num_matvecs", "vectors_that_fit", "method"),
    [(60, 200, "xtrace"), (60, 100, "hutch++"), (60, 30, "hutchinson"), (15, 200, "hutchinson")],
)
def test_the_method_is_the_best_that_fits_half_of_the_memory(
    monkeypatch, num_matvecs, vectors_that_fit, method
):
    monkeypatch.setattr(trace_method, "free_bytes", lambda device: vectors_that_fit * 200 * 8)
    assert trace(decaying(), num_matvecs).method == method


def test_what_does_not_fit_is_refused_before_any_product(monkeypatch):
    monkeypatch.setattr(trace_method, "free_bytes", lambda device: 50 * 200 * 8)
    op = CountingOperator(decaying())
    message = r"with 60 products needs 90 vectors x 200 x 8 B .* Try num_matvecs=33, or method="
    with pytest.raises(MemoryEstimateError, match=message):
        trace(op, 60, method="xtrace")
    assert op.matvecs == 0


def test_an_accuracy_is_sought_with_as_many_products_as_fit(monkeypatch):
    monkeypatch.setattr(trace_method, "free_bytes", lambda device: 60 * 200 * 8)
    with pytest.warns(NotConvergedWarning, match="after 40 products"):
        assert trace(decaying(), 150, rtol=1e-9, method="xtrace").matvecs == 40


def test_confidence_intervals_are_those_of_student():
    result = hutchinson(decaying(), 10)
    low, high = result.confidence_interval(0.9)
    assert (low + high) / 2 == pytest.approx(result.estimate)
    assert (high - low) / 2 == pytest.approx(1.8331129326536335 * result.stderr)  # 9 degrees
    for level in (0, 1):
        with pytest.raises(OptionError, match="expected level between 0 and 1"):
            result.confidence_interval(level)


def test_the_report_is_one_line():
    line = repr(hutch_plus_plus(decaying(), 60))
    assert line.startswith("TraceResult  1.6")
    for part in (" (1 s.e.) | hutch++ | 60 matvecs | seed 0 | 95 % [1.6", " +- "):
        assert part in line
    assert repr(trace(decaying(), 200)) == "TraceResult  1.639946546 | exact | 200 matvecs | seed 0"


@pytest.mark.parametrize(
    ("result", "points", "bands"),
    [
        (lambda: hutchinson(decaying(), 30), 30, 1),
        (lambda: hutchinson(decaying(), 1), 1, 0),
        (lambda: trace(decaying(), 200), 1, 1),
    ],
)
def test_the_picture_is_the_running_mean_with_its_band(result, points, bands):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    found = result()
    ax = found.plot()
    assert found.plot(ax) is ax
    means = ax.lines[0].get_ydata()
    assert len(means) == points
    assert means[-1] == pytest.approx(found.estimate)
    assert len(ax.collections) == 2 * bands
    pyplot.close(ax.figure)


def test_results_come_back_from_their_file(tmp_path):
    pytest.importorskip("safetensors")
    result = trace(decaying(), 30)
    result.save(tmp_path / "trace.safetensors")
    again = TraceResult.load(tmp_path / "trace.safetensors")
    assert repr(again) == repr(result)
    assert torch.equal(again.samples, result.samples)
    assert again.scalars()["estimate"] == result.estimate


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_matvecs": 0}, "expected num_matvecs to be at least 1, got 0"),
        ({"rtol": 0.0}, "expected rtol to be above 0, got 0.0"),
        ({"rtol": -1.0}, "expected rtol to be above 0, got -1.0"),
        ({"rtol": math.nan}, "expected rtol to be above 0, got nan"),
        ({"method": "xtracce"}, "unknown method 'xtracce'; choose one of auto, hutchinson, "),
        ({"distribution": "cauchy"}, "unknown distribution 'cauchy'; choose one of gaussian, "),
        ({"seed": -1}, "expected seed to be an integer from 0 on, got -1"),
        ({"seed": 0.5}, "expected seed to be an integer from 0 on, got 0.5"),
        (
            {"num_matvecs": 3, "method": "xtrace"},
            r'num_matvecs to be at least 4 for method="xtrace", got 3; raise it, or use method=',
        ),
        ({"num_matvecs": 7, "method": "na-hutch++"}, "num_matvecs to be at least 8"),
    ],
)
def test_bad_options_are_refused_before_any_product(options, message):
    op = CountingOperator(decaying())
    with pytest.raises(OptionError, match=message):
        trace(op, **options)
    assert op.matvecs == 0


@pytest.mark.parametrize("method", [*METHODS, "auto"])
@pytest.mark.parametrize("num_matvecs", [20, 60])
def test_products_that_are_not_finite_are_refused(method, num_matvecs):
    op = LambdaOperator(60, lambda v: v / 0.0)
    with pytest.raises(
        NonFiniteError, match=r"hold NaN or infinity, by product .* look for them in"
    ):
        trace(op, num_matvecs, method=method)
