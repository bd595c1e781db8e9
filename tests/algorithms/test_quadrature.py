"""Nodes and weights are Gauss quadratures, whatever the spectrum, dtype and number of probes."""

import math

import numpy as np
import pytest
import torch

from torchlinop import LambdaOperator, MatrixOperator
from torchlinop.algorithms.distribution_bounds import sharp_bounds
from torchlinop.algorithms.quadrature import logdet, quadrature_size, slq
from torchlinop.algorithms.quadrature_result import Quadrature
from torchlinop.algorithms.tridiagonal import lanczos_tridiagonal
from torchlinop.errors import NonFiniteError, NotConvergedWarning, OptionError, VectorError
from torchlinop.testing.gallery import with_spectrum

F64 = torch.float64


def semicircle(n, radius=1.0):
    x = np.linspace(-1, 1, 200_001)
    cdf = 0.5 + x * np.sqrt(1 - x * x) / np.pi + np.arcsin(x) / np.pi
    return torch.tensor(radius * np.interp((np.arange(n) + 0.5) / n, cdf, x))


def marchenko_pastur(n, ratio=0.5):
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    x = np.linspace(low, high, 200_001)
    pdf = np.sqrt((high - x) * (x - low)) / x
    cdf = np.concatenate([[0], np.cumsum((pdf[1:] + pdf[:-1]) / 2)])
    return torch.tensor(np.interp((np.arange(n) + 0.5) / n, cdf / cdf[-1], x))


def neural(n):
    """A bulk of radius 1/2 with ten positive and five negative outliers."""
    positive, negative = torch.linspace(2, 10, 10, dtype=F64), torch.linspace(-1.5, -0.7, 5).to(F64)
    return torch.cat([negative, semicircle(n - 15, 0.5), positive])


SPECTRA = {"semicircle": semicircle, "Marchenko-Pastur": marchenko_pastur, "neural": neural}


def recorded(A):
    """A matrix as an operator, and the list of blocks that it was multiplied by."""
    blocks = []

    def matmat(V):
        blocks.append(V.clone())
        return A @ V

    return LambdaOperator(
        len(A), lambda v: matmat(v[:, None])[:, 0], matmat=matmat, dtype=A.dtype
    ), blocks


def wasserstein(quadrature, eigenvalues):
    """∫ |difference of the distribution functions|, exactly."""
    nodes = quadrature.nodes[torch.isfinite(quadrature.nodes)]
    points = torch.cat([nodes, eigenvalues]).sort()[0]
    middles = (points[1:] + points[:-1]) / 2
    exact = torch.searchsorted(eigenvalues.sort()[0], middles, right=True) / len(eigenvalues)
    return float(((quadrature.cdf(middles).value - exact).abs() * points.diff()).sum())


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_moments_up_to_twice_the_steps_minus_one_are_exact(steps):
    eigenvalues = torch.linspace(-1, 1.2, 60, dtype=F64)
    A, Q = with_spectrum(eigenvalues)
    op, blocks = recorded(A)
    quadrature = slq(op, 3, steps)
    weights = (Q.T @ blocks[0]) ** 2  # of the spectral measure of every probe, (n, 3)
    for p in range(2 * steps):
        exact = eigenvalues**p @ weights
        moment = (quadrature.weights * quadrature.nodes**p).sum(1)
        torch.testing.assert_close(moment, exact, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_weights_of_every_probe_sum_to_one(dtype):
    quadrature = slq(MatrixOperator(with_spectrum(neural(200))[0].to(dtype)), 5, 60)
    torch.testing.assert_close(
        quadrature.weights.nansum(1), torch.ones(5, dtype=F64), rtol=0, atol=1e-14
    )


def with_a_basis(A, V, steps):
    """Nodes and weights by Lanczos with a basis that QR keeps orthonormal."""
    rules = []
    for v in V.T:
        basis = v[:, None] / v.norm()
        for _ in range(steps - 1):
            basis = torch.linalg.qr(torch.cat([basis, A @ basis[:, -1:]], 1))[0]
        theta, Y = torch.linalg.eigh(basis.T @ A @ basis)
        rules.append((theta, (Y.T @ (basis.T @ v)) ** 2))
    return rules


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(
    "f", [torch.exp, torch.sin, lambda t: 1 / (t + 5)], ids=["exp", "sin", "resolvent"]
)
def test_the_measure_is_the_same_with_and_without_a_basis(spectrum, f):
    A, _ = with_spectrum(SPECTRA[spectrum](300))
    op, blocks = recorded(A)
    quadrature = slq(op, 3, 60)
    rules = with_a_basis(A, blocks[0], 60)
    exact = torch.stack([300 * weights @ f(theta) for theta, weights in rules])
    torch.testing.assert_close(quadrature.spectral_sum(f).samples, exact, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("distance", "size"), [(0.2, (61, 2)), (0.1, (121, 5))])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_the_distance_to_the_spectrum_is_within_the_published_bound(
    spectrum, distance, size, dtype
):
    assert quadrature_size(distance, 1000, eta=0.05) == size
    eigenvalues = SPECTRA[spectrum](1000)
    steps, probes = size
    quadrature = slq(MatrixOperator(with_spectrum(eigenvalues)[0].to(dtype)), probes, steps)
    span = float(eigenvalues[-1] - eigenvalues[0])
    assert wasserstein(quadrature, eigenvalues) <= distance / 5 * span  # it is far from sharp
    assert quadrature.wasserstein_bound(0.05) == pytest.approx(distance * span, rel=0.02)


@pytest.mark.parametrize("values", [[0.0], [1.0], [1.0, 50.0], [-3.0, 0.0, 2.0]])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_few_distinct_eigenvalues_are_found_exactly_and_padded(values, dtype):
    eigenvalues = torch.tensor(values, dtype=F64).repeat_interleave(20)
    quadrature = slq(MatrixOperator(with_spectrum(eigenvalues)[0].to(dtype)), 4, 15)
    tolerance = 50 * torch.finfo(dtype).eps * max(map(abs, values))
    for rule in quadrature.rules:
        heavy = rule.nodes[rule.weights > 1e-6]
        torch.testing.assert_close(heavy, torch.tensor(values, dtype=F64), rtol=0, atol=tolerance)
    if dtype == F64:
        assert torch.isnan(quadrature.nodes[:, len(values) :]).all()


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_outliers_are_found_once_each_although_lanczos_copies_them(dtype):
    eigenvalues = neural(1000)
    quadrature = slq(MatrixOperator(with_spectrum(eigenvalues)[0].to(dtype)), 10, 70)
    outliers = quadrature.outliers
    exact = torch.cat([eigenvalues[:5], eigenvalues[-10:]])
    tolerance = {F64: 1e-8, torch.float32: 2e-5, torch.bfloat16: 5e-3}[dtype]
    torch.testing.assert_close(outliers.values, exact, rtol=0, atol=tolerance)
    errors = (outliers.counts - 1).abs() / (1000 * outliers.stderr)
    assert errors.max() < 4


def test_the_count_of_a_multiple_outlier_is_its_multiplicity():
    eigenvalues = torch.cat([semicircle(391, 0.1), torch.full((9,), 3.0)])
    outliers = slq(MatrixOperator(with_spectrum(eigenvalues)[0]), 40, 30).outliers
    assert outliers.values.tolist() == pytest.approx([3.0])
    assert abs(float(outliers.counts) - 9) < 3 * 400 * float(outliers.stderr)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("steps", [3, 20, 60])
@pytest.mark.parametrize(("dtype", "rounding"), [(F64, 1e-12), (torch.float32, 1e-5)])
def test_bounds_of_the_distribution_function_enclose_that_of_every_probe(
    spectrum, steps, dtype, rounding
):
    eigenvalues = SPECTRA[spectrum](200)
    A, Q = with_spectrum(eigenvalues)
    op, blocks = recorded(A.to(dtype))
    quadrature = slq(op, 4, steps)
    x = torch.linspace(-1.6, 10.1, 301, dtype=F64)
    below = (eigenvalues[:, None] <= x).double()
    exact = (((Q.T @ blocks[0].double()) ** 2).T @ below).mean(0)
    low, high = quadrature.cdf_bounds(x)
    assert ((low.value - rounding <= exact) & (exact <= high.value + rounding)).all()
    value = quadrature.cdf(x).value
    assert ((low.value - rounding <= value) & (value <= high.value + rounding)).all()


def test_bounds_of_the_distribution_function_are_attained_by_a_measure_of_the_same_moments():
    theta = torch.tensor([-1.0, 0.2, 1.5, 2.0], dtype=F64)
    w = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=F64)
    op = MatrixOperator(torch.diag(theta))
    lanczos = lanczos_tridiagonal(op, w.sqrt(), 3)  # three steps leave one node free
    nodes, Y = torch.linalg.eigh(lanczos.matrix())
    residuals = lanczos.residual_norm * Y[-1].abs()
    low, high = sharp_bounds(nodes, Y[0] ** 2, residuals, theta)  # where these four are the nodes
    torch.testing.assert_close(high, w.cumsum(0), rtol=0, atol=1e-13)
    torch.testing.assert_close(low, w.cumsum(0) - w, rtol=0, atol=1e-13)


@pytest.mark.parametrize("negative", [0, 40, 200, 400])
def test_the_interval_of_the_negative_mass_holds_the_fraction_of_negative_eigenvalues(negative):
    magnitudes = torch.linspace(0.1, 2, 400, dtype=F64)
    eigenvalues = torch.cat([-magnitudes[:negative], magnitudes[negative:]])
    value, low, high = slq(MatrixOperator(with_spectrum(eigenvalues)[0]), 10, 40).negative_mass(
        0.99
    )
    assert low <= negative / 400 <= high
    assert low <= value <= high


def test_rounding_of_a_kernel_is_no_negative_mass():
    eigenvalues = torch.cat([torch.zeros(300, dtype=F64), torch.logspace(-6, 1, 100, dtype=F64)])
    quadrature = slq(MatrixOperator(with_spectrum(eigenvalues)[0]), 10, 60)
    assert quadrature.negative_mass().value == 0
    assert quadrature.negative_mass().low == 0


@pytest.mark.parametrize(
    "f", [torch.exp, torch.square, lambda t: (t + 2).log()], ids=["exp", "square", "log"]
)
def test_spectral_sums_are_within_their_standard_errors(f):
    eigenvalues = neural(500)
    result = slq(MatrixOperator(with_spectrum(eigenvalues)[0]), 30, 50).spectral_sum(f)
    assert abs(result.estimate - float(f(eigenvalues).sum())) < 3.5 * result.stderr
    low, high = result.confidence_interval(0.999)
    assert low <= float(f(eigenvalues).sum()) <= high


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_standard_error_is_that_of_probes_on_a_sphere(dtype):
    eigenvalues, n = torch.linspace(-1, 2, 60, dtype=F64), 60
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(n, n, dtype=dtype))[0]
    result = slq(MatrixOperator((Q * eigenvalues) @ Q.mH), 400, 5).spectral_sum(torch.square)
    beta = 2 if dtype.is_complex else 1
    law = 2 * n**2 / (beta * n + 2) * eigenvalues.square().var(correction=0) / 400
    assert result.stderr == pytest.approx(float(law) ** 0.5, rel=0.05)
    assert result.stderr == pytest.approx(float(result.samples.std()) / 400**0.5, rel=0.15)


def test_five_probes_have_honest_intervals_even_of_a_single_eigenvalue():
    A, n = with_spectrum(torch.eye(100, dtype=F64)[0])[0], 100
    covered = []
    for seed in range(150):
        q = slq(MatrixOperator(A), 5, 4, seed=seed)
        low, high = q.spectral_sum(lambda t: t).confidence_interval()
        fraction = q.cdf(0.5)
        covered += [low <= 1 <= high, abs(fraction.value - (n - 1) / n) <= 2.78 * fraction.stderr]
    assert 0.9 <= np.mean(covered) <= 0.99


def test_the_standard_error_of_a_sum_holds_the_rounding_of_eigenvalues():
    op = LambdaOperator(200, lambda v: 0.7 * v, dtype=torch.float32)
    result = logdet(op, num_probes=5, num_steps=10)
    error = abs(result.estimate - 200 * math.log(0.7))
    assert error <= 2 * result.stderr < 200 * 2e-6


def test_a_root_of_a_semidefinite_matrix_takes_its_kernel_as_zero():
    eigenvalues = torch.cat([torch.zeros(50, dtype=F64), torch.linspace(1, 2, 50, dtype=F64)])
    result = slq(MatrixOperator(with_spectrum(eigenvalues)[0]), 30, 40).spectral_sum(torch.sqrt)
    assert abs(result.estimate - float(eigenvalues.sqrt().sum())) < 3.5 * result.stderr


def test_log_determinant_is_within_its_standard_error():
    eigenvalues = torch.logspace(-1, 1, 300, dtype=F64)
    result = logdet(MatrixOperator(with_spectrum(eigenvalues)[0]), damping=0.5, num_probes=20)
    assert abs(result.estimate - float((eigenvalues + 0.5).log().sum())) < 3.5 * result.stderr


def test_the_log_density_integrates_to_the_fraction_of_each_sign():
    eigenvalues = torch.cat(
        [-torch.logspace(-2, 0, 50, dtype=F64), torch.logspace(-2, 1, 150, dtype=F64)]
    )
    quadrature = slq(MatrixOperator(with_spectrum(eigenvalues)[0]), 5, 60)
    exponents = torch.linspace(-8, 3, 2000, dtype=F64)
    step = float(exponents[1] - exponents[0])
    negative = quadrature.cdf(0.0).value
    for sign, fraction in ((-1, negative), (1, 1 - negative)):
        density = quadrature.log_density(exponents, sign=sign).value
        torch.testing.assert_close(density.sum() * step, fraction, rtol=1e-9, atol=0)


def test_the_answer_does_not_depend_on_how_many_probes_go_at_once():
    op = MatrixOperator(with_spectrum(neural(200))[0])
    whole = slq(op, 5, 12)
    parts = slq(op, 5, 12, probes_at_once=2)
    torch.testing.assert_close(parts.nodes, whole.nodes, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(slq(op, 3, 12).nodes, whole.nodes[:3], rtol=1e-11, atol=1e-11)


def test_neighbouring_seeds_share_no_probe():
    op, blocks = recorded(with_spectrum(semicircle(400))[0])
    slq(op, 8, 1, seed=0)
    slq(op, 8, 1, seed=1)
    assert (blocks[0].T @ blocks[1]).abs().max() < 0.3


@pytest.mark.parametrize("power", [-40, 40])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_power_of_two_scales_the_nodes_and_nothing_else(power, dtype):
    A = with_spectrum(neural(200))[0].to(dtype)
    plain, scaled = (slq(MatrixOperator(B), 3, 40) for B in (A, A * 2.0**power))
    torch.testing.assert_close(
        scaled.nodes, plain.nodes * 2.0**power, rtol=1e-12, atol=1e-12 * 2.0**power
    )
    torch.testing.assert_close(scaled.weights, plain.weights, rtol=0, atol=1e-12)


def test_a_hermitian_matrix_has_real_nodes():
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(50, 50, dtype=torch.complex128))[0]
    eigenvalues = torch.tensor([-2.0, 1.0, 4.0], dtype=F64).repeat_interleave(50)[:50]
    quadrature = slq(MatrixOperator((Q * eigenvalues) @ Q.mH), 2, 10)
    for rule in quadrature.rules:
        torch.testing.assert_close(rule.nodes, eigenvalues.unique(), rtol=1e-12, atol=0)


def interrupted_at(A, product):
    products = iter(range(product + 1))

    def matmat(V):
        if next(products) == product:
            raise KeyboardInterrupt
        return A @ V

    return LambdaOperator(len(A), lambda v: A @ v, matmat=matmat, dtype=F64)


def test_an_interrupted_quadrature_has_the_complete_probes():
    A = with_spectrum(semicircle(100))[0]
    with pytest.warns(NotConvergedWarning, match="interrupted after 10 of 10 steps of 4 of 6"):
        interrupted = slq(interrupted_at(A, 25), 6, 10, probes_at_once=2)
    assert interrupted.warnings == ("interrupted after 10 of 10 steps of 4 of 6 probes",)
    torch.testing.assert_close(interrupted.nodes, slq(MatrixOperator(A), 4, 10).nodes)


def test_a_quadrature_interrupted_before_its_first_product_is_none():
    with pytest.raises(KeyboardInterrupt):
        slq(interrupted_at(torch.eye(5, dtype=F64), 0), 2, 3)


def test_an_interrupted_quadrature_has_the_steps_taken():
    A = with_spectrum(semicircle(100))[0]
    with pytest.warns(NotConvergedWarning, match="interrupted after 6 of 50 steps"):
        interrupted = slq(interrupted_at(A, 6), 3, 50)
    assert interrupted.num_steps == 6
    assert interrupted.warnings == ("interrupted after 6 of 50 steps of 3 of 3 probes",)
    torch.testing.assert_close(
        interrupted.nodes[:, :6], slq(MatrixOperator(A), 3, 6).nodes, rtol=1e-12, atol=1e-12
    )


def test_a_quadrature_can_be_saved_and_loaded(tmp_path):
    quadrature = slq(MatrixOperator(torch.diag(torch.arange(9.0))), 2, 3, seed=5)
    quadrature.save(tmp_path / "slq.safetensors")
    again = Quadrature.load(tmp_path / "slq.safetensors")
    torch.testing.assert_close(again.nodes, quadrature.nodes, equal_nan=True)
    assert (again.seed, again.size, again.dtype) == (5, 9, torch.float32)


def refusing(n=10):
    def refuse(v):
        raise AssertionError("a product was taken")

    return LambdaOperator(n, refuse, dtype=F64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: slq(refusing(), 0), "expected at least one probe and step, got 0 probes"),
        (lambda: slq(refusing(), 2, 0), "expected at least one probe and step, got 2 probes"),
        (lambda: slq(refusing(), 2, probes_at_once=0), "got 2 probes, 0 at once"),
        (lambda: quadrature_size(2.0, 10), "expected a distance between 0 and 1, got 2.0"),
        (lambda: quadrature_size(0.1, 10, eta=0.0), "expected eta between 0 and 1, got 0.0"),
    ],
)
def test_impossible_options_are_refused_before_any_product(call, message):
    with pytest.raises(OptionError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q: q.density(torch.linspace(0, 1, 5), -1.0), OptionError, "sigma to be a positive"),
        (lambda q: q.density(torch.tensor([1.0, 0.0])), VectorError, "an ascending grid of two"),
        (
            lambda q: q.log_density(torch.linspace(0, 1, 5), sign=0),
            OptionError,
            "sign to be 1 or -1",
        ),
        (lambda q: q.spectral_sum(torch.log), NonFiniteError, "not finite at the Ritz value -1"),
        (lambda q: q.spectral_sum(lambda t: t.sum()), VectorError, "entry by entry"),
        (lambda q: q.negative_mass(1.5), OptionError, "level between 0 and 1, got 1.5"),
    ],
)
def test_impossible_questions_are_refused(call, error, message):
    quadrature = slq(MatrixOperator(torch.diag(torch.tensor([-1.0, 2.0], dtype=F64))), 2, 2)
    with pytest.raises(error, match=message):
        call(quadrature)


def test_products_that_are_not_finite_are_named():
    with pytest.raises(NonFiniteError, match="hold NaN or infinity, by product 4"):
        slq(MatrixOperator(torch.full((5, 5), math.nan)), 2, 4)


@pytest.mark.parametrize("smallest", [0.0, -1.0])
def test_the_log_determinant_of_a_singular_or_indefinite_matrix_is_refused(smallest):
    eigenvalues = torch.linspace(1, 2, 30, dtype=F64)
    eigenvalues[0] = smallest
    with pytest.raises(NonFiniteError, match=r"log det needs a positive definite .* pass damping="):
        logdet(MatrixOperator(with_spectrum(eigenvalues)[0]), num_steps=30)


def test_repr_says_what_was_done():
    quadrature = slq(MatrixOperator(torch.diag(torch.arange(9.0))), 2, 3, seed=5)
    assert "n = 9 | 2 probes x 3 steps | 6 matvecs" in repr(quadrature)
    assert "95 % [" in repr(quadrature.spectral_sum(torch.exp))


def test_no_products_are_taken_of_exhausted_krylov_spaces():
    A, blocks = recorded(torch.diag(torch.arange(4.0, dtype=F64).repeat(10)))
    found = slq(A, 3, 20)
    assert (len(blocks), found.matvecs, found.num_steps) == (4, 12, 20)
    nodes = found.nodes[:, :4]
    torch.testing.assert_close(nodes, torch.arange(4.0).double().expand(3, 4), rtol=0, atol=1e-13)
    assert found.nodes[:, 4:].isnan().all()
