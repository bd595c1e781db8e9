"""Diagonals: XDiag leaves out one probe after the other, and every entry has its error bar."""

import pytest
import torch

from torchlinop import CountingOperator, HessianOperator, LambdaOperator, MatrixOperator
from torchlinop.algorithms import diagonal as diagonal_module
from torchlinop.algorithms.diagonal import DiagonalResult, diagonal
from torchlinop.algorithms.probes import Probes
from torchlinop.errors import NonFiniteError, OptionError, SymmetryError
from torchlinop.testing import gallery, spectra
from torchlinop.testing.gallery import with_spectrum
from torchlinop.testing.oracles import dense_hessian

METHODS = ["xdiag", "hutchinson"]


def matrix(n=60, seed=0):
    eigenvalues = 0.8 ** torch.arange(n).double() * torch.tensor([1.0, 1.0, -0.5]).repeat(n // 3)
    return with_spectrum(eigenvalues, seed)[0]


def xdiag_samples(A, Omega):
    """For every probe: project onto the products of the others, and sample what is left."""
    n, k = Omega.shape
    samples = []
    for i in range(k):
        Q = torch.linalg.qr(A @ Omega[:, [j for j in range(k) if j != i]]).Q
        w, rest = Omega[:, i], torch.eye(n).double() - Q @ Q.T
        samples.append((Q @ Q.T @ A).diagonal() + w * (rest @ A @ w))
    return torch.stack(samples)


def test_xdiag_leaves_out_one_probe_after_the_other():
    A, k = matrix(), 8
    op = MatrixOperator(A)
    Omega = Probes(op.space, "rademacher", 0, 0).columns(0, k)
    result = diagonal(op, 2 * k)
    expected = xdiag_samples(A, Omega).mean(0)
    torch.testing.assert_close(result.estimate, expected, rtol=1e-12, atol=1e-12)
    others = [[j for j in range(k) if j != i] for i in range(k)]
    t = torch.stack([xdiag_samples(A, Omega[:, o]).mean(0) for o in others])
    jackknife = ((k - 1) / k * (t - t.mean(0)).square().sum(0)).sqrt()
    torch.testing.assert_close(result.stderr, jackknife, rtol=1e-9, atol=1e-13)


def test_hutchinson_averages_over_all_probes():
    A = matrix()
    op = MatrixOperator(A)
    Omega = Probes(op.space, "rademacher", 0, 0).columns(0, 37)
    result = diagonal(op, 37, method="hutchinson")
    samples = Omega * (A @ Omega)
    torch.testing.assert_close(result.estimate, samples.mean(1), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(result.stderr, samples.std(1) / 37**0.5, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spectrum", [spectra.polynomial, spectra.neural])
def test_two_standard_errors_cover_the_entries(spectrum, method):
    A = with_spectrum(spectrum(200))[0]
    results = [diagonal(MatrixOperator(A), 40, method=method, seed=s) for s in range(10)]
    errors = torch.stack([r.estimate - A.diagonal() for r in results])
    stderrs = torch.stack([r.stderr for r in results])
    assert float((errors.abs() <= 2 * stderrs).double().mean()) >= 0.9
    assert errors.mean(0).norm() < 0.6 * errors.norm(dim=1).mean()  # without bias: 10^-1/2


def test_xdiag_is_as_accurate_as_published():
    """Relative errors of Hutchinson 1.84 and XDiag 0.021, for i^-2 and 60 products."""
    A = with_spectrum(spectra.polynomial(1000))[0]
    truth = A.diagonal()

    def error(method):
        found = [diagonal(MatrixOperator(A), 60, method=method, seed=s) for s in range(5)]
        return float(sum((r.estimate - truth).norm() for r in found) / 5 / truth.norm())

    assert 1 / 2 < error("xdiag") / 0.021 < 2
    assert 1 / 2 < error("hutchinson") / 1.84 < 2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_xdiag_is_exact_if_the_rank_is_below_the_number_of_probes(dtype, tolerance):
    eigenvalues = torch.zeros(100).double()
    eigenvalues[:6] = torch.linspace(-2, 3, 6)
    A = with_spectrum(eigenvalues)[0].to(dtype)
    result = diagonal(MatrixOperator(A), 20)
    assert (result.estimate - A.diagonal()).abs().max() < tolerance
    assert result.stderr.max() < 100 * tolerance


@pytest.mark.parametrize("method", METHODS)
def test_the_diagonal_is_exact_if_as_many_products_as_rows_are_granted(method):
    A = matrix()
    op = CountingOperator(MatrixOperator(A))
    result = diagonal(op, 100, method=method)
    torch.testing.assert_close(result.estimate, A.diagonal(), rtol=1e-14, atol=0)
    assert (result.method, result.matvecs, op.matvecs) == ("exact", 60, 60)
    assert not result.stderr.any()


def test_a_hessian_has_the_diagonal_of_the_dense_one():
    p = gallery.mlp()
    H = HessianOperator(p.model, p.batches, p.loss_fn)
    truth = dense_hessian(p.full_loss, p.parameters).diagonal()
    result = diagonal(H, 24)
    assert float(((result.estimate - truth).abs() <= 2 * result.stderr).double().mean()) > 0.85


@pytest.mark.parametrize("method", METHODS)
def test_the_diagonal_of_a_hermitian_matrix_is_real(method):
    U = torch.linalg.qr(torch.randn(60, 60, dtype=torch.complex128)).Q
    A = (U * spectra.polynomial(60).to(U)) @ U.mH
    A = (A + A.mH) / 2
    result = diagonal(MatrixOperator(A), 40, method=method)
    assert result.estimate.dtype == torch.float64
    within = (result.estimate - A.diagonal().real).abs() <= 3 * result.stderr
    assert float(within.double().mean()) > 0.9


def test_rows_in_pieces_change_nothing(monkeypatch):
    op = MatrixOperator(matrix())
    whole = diagonal(op, 16)
    monkeypatch.setattr(diagonal_module, "_ENTRIES", 100)
    pieces = diagonal(op, 16)
    torch.testing.assert_close(pieces.estimate, whole.estimate, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(pieces.stderr, whole.stderr, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(("method", "spent"), [("xdiag", 16), ("hutchinson", 17)])
def test_no_more_products_are_taken_than_granted(method, spent):
    op = CountingOperator(MatrixOperator(matrix()))
    assert diagonal(op, 17, method=method).matvecs == op.matvecs == spent


def test_the_report_does_not_show_the_entries(tmp_path):
    pytest.importorskip("safetensors")
    result = diagonal(MatrixOperator(matrix()), 16)
    assert repr(result).startswith("DiagonalResult  60 entries, 2-norm 0.")
    assert set(result.scalars()) == {"matvecs", "norm", "error"}
    result.save(tmp_path / "diagonal")
    assert torch.equal(DiagonalResult.load(tmp_path / "diagonal").stderr, result.stderr)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_matvecs": 0}, "expected num_matvecs to be at least 1, got 0"),
        ({"num_matvecs": 3}, 'to be at least 4 for method="xdiag", got 3'),
        ({"num_matvecs": 1, "method": "hutchinson"}, "a standard error needs two samples"),
        ({"method": "diag++"}, r"unknown method 'diag\+\+'; choose one of xdiag, hutchinson"),
        ({"seed": -1}, "expected seed to be an integer from 0 on, got -1"),
    ],
)
def test_bad_options_are_refused_before_any_product(options, message):
    op = CountingOperator(MatrixOperator(matrix()))
    with pytest.raises(OptionError, match=message):
        diagonal(op, **options)
    assert op.matvecs == 0


@pytest.mark.parametrize("method", METHODS)
def test_products_that_are_not_finite_are_refused(method):
    with pytest.raises(NonFiniteError, match="hold NaN or infinity"):
        diagonal(LambdaOperator(60, lambda v: v / 0.0), 20, method=method)


def test_xdiag_refuses_a_matrix_that_is_not_symmetric():
    A = torch.randn(60, 60, dtype=torch.float64)
    with pytest.raises(SymmetryError, match=r"<u,Av>-<v,Au>"):
        diagonal(LambdaOperator(60, lambda v: A @ v, dtype=torch.float64), 20)
