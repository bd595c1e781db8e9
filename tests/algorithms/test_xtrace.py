"""XTrace and XNysTrace leave out one probe after the other, and are jackknifed: judged by that."""

import pytest
import torch

from torchlinop import CountingOperator, LambdaOperator, MatrixOperator
from torchlinop.algorithms.probes import Probes
from torchlinop.algorithms.trace import trace, xnystrace, xtrace
from torchlinop.errors import DefinitenessError, NonFiniteError, SymmetryError
from torchlinop.testing import spectra
from torchlinop.testing.gallery import with_spectrum

RESPHERED = [("rademacher", False), ("sphere", True), ("gaussian", True)]


def indefinite(n=60, seed=0):
    eigenvalues = 0.8 ** torch.arange(n).double() * torch.tensor([1.0, 1.0, -0.5]).repeat(n // 3)
    return with_spectrum(eigenvalues, seed)[0]


def positive(n=60, seed=0):
    return with_spectrum(0.8 ** torch.arange(n).double(), seed)[0]


def probes(operator, k, distribution, seed=0):
    return Probes(operator.space, distribution, seed, 0).columns(0, k)


def outside(X):
    """The projector onto the complement of the range of X."""
    Q = torch.linalg.qr(X).Q
    return torch.eye(len(X)).double() - Q @ Q.T


def xtrace_samples(A, Omega, resphered):
    """For every probe: project onto the products of the others, and sample what is left."""
    n, k = Omega.shape
    samples = []
    for i in range(k):
        others = [j for j in range(k) if j != i]
        rest = outside(A @ Omega[:, others])
        w = rest @ Omega[:, i]
        c = (n - k + 1) / (w @ w) if resphered else 1
        samples.append(A.trace() - (rest @ A @ rest).trace() + c * (w @ A @ w))
    return torch.stack(samples)


def xnystrace_samples(A, Omega, resphered):
    """For every probe: the Nyström approximation of the others, and a sample of the rest."""
    n, k = Omega.shape
    samples = []
    for i in range(k):
        others, w = Omega[:, [j for j in range(k) if j != i]], Omega[:, i]
        Y = A @ others
        approximation = Y @ torch.linalg.solve(others.T @ Y, Y.T)
        left = outside(others) @ w
        c = (n - k + 1) / (left @ left) if resphered else 1
        samples.append(approximation.trace() + c * (w @ (A - approximation) @ w))
    return torch.stack(samples)


def jackknife(samples, A, Omega, resphered):
    k = Omega.shape[1]
    others = [[j for j in range(k) if j != i] for i in range(k)]
    t = torch.stack([samples(A, Omega[:, o], resphered).mean() for o in others])
    return ((k - 1) / k * (t - t.mean()).square().sum()).sqrt()


@pytest.mark.parametrize(("distribution", "resphered"), RESPHERED)
@pytest.mark.parametrize("matrix", [indefinite, positive])
def test_xtrace_leaves_out_one_probe_after_the_other(matrix, distribution, resphered):
    A = matrix()
    op = MatrixOperator(A)
    result = xtrace(op, 16, distribution=distribution)
    Omega = probes(op, 8, distribution)
    expected = xtrace_samples(A, Omega, resphered)
    torch.testing.assert_close(result.samples, expected, rtol=1e-12, atol=1e-12)
    assert result.estimate == pytest.approx(float(expected.mean()), rel=1e-12)
    stderr = jackknife(xtrace_samples, A, Omega, resphered)
    assert result.stderr == pytest.approx(float(stderr), rel=1e-10)


@pytest.mark.parametrize(("distribution", "resphered"), RESPHERED)
def test_xnystrace_leaves_out_one_probe_after_the_other(distribution, resphered):
    A = positive()
    op = MatrixOperator(A)
    result = xnystrace(op, 8, distribution=distribution)
    Omega = probes(op, 8, distribution)
    expected = xnystrace_samples(A, Omega, resphered)
    torch.testing.assert_close(result.samples, expected, rtol=1e-12, atol=0)
    stderr = jackknife(xnystrace_samples, A, Omega, resphered)
    assert result.stderr == pytest.approx(float(stderr), rel=1e-10)


def low_rank(rank, dtype, n=120):
    eigenvalues = torch.zeros(n, dtype=torch.float64)
    eigenvalues[:rank] = torch.linspace(3, 1, rank, dtype=torch.float64)
    return MatrixOperator(with_spectrum(eigenvalues)[0].to(dtype)), float(eigenvalues.sum())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize("method", ["xtrace", "xnystrace"])
def test_the_trace_is_exact_if_the_rank_is_below_the_number_of_probes(
    method, rank, dtype, tolerance
):
    op, truth = low_rank(rank, dtype)
    result = trace(op, 20, method=method)
    assert result.estimate == pytest.approx(truth, rel=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("method", "num_matvecs"), [("xtrace", 20), ("xnystrace", 10)])
def test_the_error_bar_is_rounding_if_the_rank_is_well_below_the_number_of_probes(
    method, num_matvecs, dtype, tolerance
):
    op, truth = low_rank(5, dtype)
    assert trace(op, num_matvecs, method=method).stderr < tolerance * truth


@pytest.mark.parametrize("method", ["xtrace", "xnystrace"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_of_zeros_are_no_obstacle(method, dtype):
    A = torch.zeros(80, 80, dtype=dtype)
    A[:5, :5] = 2 * torch.eye(5)
    result = trace(MatrixOperator(A), 24, method=method)
    assert result.estimate == pytest.approx(10, rel=20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("method", ["xtrace", "xnystrace"])
def test_the_zero_matrix_has_trace_zero(method):
    result = trace(MatrixOperator(torch.zeros(50, 50).double()), 20, method=method)
    assert (result.estimate, result.stderr) == (0, 0)


@pytest.mark.parametrize("method", ["xtrace", "xnystrace"])
@pytest.mark.parametrize("value", [1.0, 1e-12, 1e12])
def test_a_multiple_of_the_identity_has_no_error(method, value):
    op = LambdaOperator(90, lambda v: value * v, dtype=torch.float64)
    result = trace(op, 20, method=method)
    assert result.estimate == pytest.approx(90 * value, rel=1e-13)


@pytest.mark.parametrize("power", [-40, 40])
@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "na-hutch++", "xtrace"])
def test_powers_of_two_scale_estimates_bit_by_bit(method, power):
    A = indefinite()
    plain = trace(MatrixOperator(A), 24, method=method)
    scaled = trace(MatrixOperator(A * 2.0**power), 24, method=method)
    assert scaled.estimate == plain.estimate * 2.0**power
    assert scaled.stderr == pytest.approx(plain.stderr * 2.0**power, rel=1e-12)


@pytest.mark.parametrize("spectrum", [spectra.polynomial, spectra.exponential])
def test_small_float32_matrices_are_not_rounded_away(spectrum):
    """A rank test against eps itself would lose a hundredth of them."""
    eigenvalues = 1e-7 * spectrum(300)
    op = MatrixOperator(with_spectrum(eigenvalues)[0].float())
    result = xtrace(op, 120)
    truth = float(eigenvalues.sum())
    assert abs(result.estimate - truth) < 4 * result.stderr
    assert result.stderr < 1e-3 * truth


@pytest.mark.parametrize(
    ("method", "base", "probes", "bound"),
    [("xtrace", 0.7, 120, 2e-7), ("xtrace", 0.9, 120, 5e-7), ("xnystrace", 0.7, 120, 5e-7)],
)
def test_float32_is_accurate_to_rounding_beyond_the_numerical_rank(method, base, probes, bound):
    eigenvalues = spectra.exponential(1000, base)
    op = MatrixOperator(with_spectrum(eigenvalues)[0].float())
    result = trace(op, 240, method=method)
    assert result.estimate == pytest.approx(float(eigenvalues.sum()), rel=bound)


@pytest.mark.parametrize(("method", "spent", "calls"), [("xtrace", 40, 4), ("xnystrace", 41, 3)])
def test_products_are_taken_in_blocks_of_sixteen(method, spent, calls):
    op = CountingOperator(MatrixOperator(positive()))
    result = trace(op, 41, method=method)
    assert result.matvecs == op.matvecs == spent
    assert op.matmats == calls


def test_xnystrace_refuses_a_matrix_with_negative_eigenvalues():
    A = with_spectrum(spectra.neural(200))[0]
    with pytest.raises(DefinitenessError, match=r"expected no negative eigenvalue. Use method="):
        xnystrace(MatrixOperator(A), 30)


@pytest.mark.parametrize("method", ["xtrace", "xnystrace"])
def test_matrices_that_are_not_symmetric_are_refused(method):
    A = torch.randn(60, 60, generator=torch.Generator().manual_seed(0)).double()
    with pytest.raises(SymmetryError, match=r"<u,Av>-<v,Au>"):
        trace(LambdaOperator(60, lambda v: A @ v, dtype=torch.float64), 20, method=method)


@pytest.mark.parametrize("method", ["xtrace", "xnystrace"])
def test_products_that_are_not_finite_are_refused(method):
    op = LambdaOperator(60, lambda v: v / 0.0)
    with pytest.raises(NonFiniteError, match="hold NaN or infinity"):
        trace(op, 20, method=method)
