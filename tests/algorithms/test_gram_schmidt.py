"""Columns are orthonormal or zero, and Y = Q R, however dependent the columns of Y are."""

import pytest
import torch

from torchlinop import VectorSpace
from torchlinop.algorithms.gram_schmidt import OrthonormalColumns
from torchlinop.testing import spectra
from torchlinop.testing.gallery import with_spectrum

DTYPES = [torch.float64, torch.float32, torch.complex128]


def independent(dtype):
    return torch.randn(300, 40, dtype=dtype)


def graded(dtype):
    """Products of a matrix whose numerical rank is below the number of columns."""
    A = with_spectrum(spectra.exponential(300, 0.5))[0].to(dtype)
    return A @ torch.randn(300, 140, dtype=dtype)


def repeated(dtype):
    return torch.randn(300, 5, dtype=dtype).repeat(1, 8)


def few_rows(dtype):
    return torch.cat([torch.randn(7, 30, dtype=dtype), torch.zeros(293, 30, dtype=dtype)])


def zero(dtype):
    return torch.zeros(300, 5, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [independent, graded, repeated, few_rows, zero])
@pytest.mark.parametrize("scale", [1.0, 1e-12])
def test_columns_are_orthonormal_or_zero_and_reproduce_what_was_given(columns, dtype, scale):
    Y = scale * columns(dtype)
    basis = OrthonormalColumns(VectorSpace(300, dtype, torch.device("cpu")))
    half = Y.shape[1] // 2
    R = torch.zeros(Y.shape[1], Y.shape[1], dtype=torch.promote_types(dtype, torch.float64))
    R[:half, :half] = basis.extend(Y[:, :half])
    R[:, half:] = basis.extend(Y[:, half:])
    eps = torch.finfo(dtype).eps
    gram = basis.Q.mH @ basis.Q
    assert (gram - torch.diag(gram.diagonal())).abs().max() < 20 * eps
    lengths = gram.diagonal().real
    assert (torch.minimum(lengths, (lengths - 1).abs()) < 20 * eps).all()
    assert (basis.Q.to(R) @ R - Y.to(R)).norm() <= 20 * eps * Y.norm()


@pytest.mark.parametrize(("columns", "rank"), [(independent, 40), (few_rows, 7), (zero, 0)])
def test_no_direction_is_made_of_rounding_errors_inside_the_span(columns, rank):
    basis = OrthonormalColumns(VectorSpace(300, torch.float64, torch.device("cpu")), 40)
    basis.extend(columns(torch.float64))
    assert int((basis.Q.norm(dim=0) > 0.5).sum()) == rank


def test_what_is_projected_out_is_orthogonal():
    basis = OrthonormalColumns(VectorSpace(300, torch.float64, torch.device("cpu")))
    basis.extend(independent(torch.float64))
    G = torch.randn(300, 3, dtype=torch.float64)
    rest = basis.project_out(G)
    assert (basis.Q.T @ rest).abs().max() < 1e-14
    torch.testing.assert_close(rest, G - basis.Q @ (basis.Q.T @ G), rtol=1e-12, atol=1e-13)
