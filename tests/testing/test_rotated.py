"""Operators with prescribed spectra that are never formed."""

import math

import pytest
import torch

from torchlinop import lanczos
from torchlinop.errors import OptionError, VectorError
from torchlinop.testing.answers import assert_eigenpairs
from torchlinop.testing.assertions import assert_linear, assert_symmetric
from torchlinop.testing.rotated import RotatedOperator, hartley
from torchlinop.testing.stress import stress_operators, stress_spectra

F64 = torch.float64


@pytest.mark.parametrize("n", [1, 2, 3, 8, 30, 49])
def test_hartley_transform_is_its_matrix_and_its_own_inverse(n):
    i = torch.arange(n, dtype=F64)
    angles = 2 * math.pi * torch.outer(i, i) / n
    H = (angles.cos() + angles.sin()) / n**0.5
    eye = torch.eye(n, dtype=F64)
    torch.testing.assert_close(hartley(eye), H, rtol=0, atol=1e-13)
    torch.testing.assert_close(hartley(hartley(eye)), eye, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", stress_spectra())
def test_spectrum_of_the_dense_matrix_is_the_one_prescribed(name, dtype):
    op = stress_operators(60, dtype)[name]
    values = torch.linalg.eigvalsh(op.to_dense().double()).flip(0)
    scale = max(1e-300, float(op.eigenvalues.abs().max()))
    expected = stress_spectra(60)[name]
    assert float((values - expected).abs().max()) <= 20 * torch.finfo(dtype).eps * scale


def test_eigenvectors_are_those_of_the_eigenvalues():
    op = RotatedOperator(torch.linspace(3, -1, 50, dtype=F64))
    chosen = torch.tensor([0, 7, 49])
    assert_eigenpairs(op, op.eigenvalues[chosen], op.eigenvectors(chosen), rtol=1e-14)


def test_no_eigenvector_is_sparse():
    op = RotatedOperator(torch.ones(64, dtype=F64))
    largest = op.eigenvectors(torch.arange(64)).abs().amax(0)
    assert float(largest.max()) <= (2 / 64) ** 0.5 + 1e-14


def test_eigenvalues_at_hundred_thousand_rows_are_solved_for():
    values = 0.5 * torch.rand(10**5, generator=torch.Generator().manual_seed(0), dtype=F64)
    values[:3] = torch.tensor([9.0, 7.0, 4.0])
    op = RotatedOperator(values)
    assert_linear(op)
    assert_symmetric(op)
    result = lanczos(op, 3, which="LA", ncv=10)
    torch.testing.assert_close(result.eigenvalues, values[:3], rtol=1e-11, atol=0)


def test_seeds_give_other_eigenvectors():
    values = torch.linspace(0, 1, 20, dtype=F64)
    first, second = (RotatedOperator(values, seed=seed).to_dense() for seed in (0, 1))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("values", [torch.ones(2, 2), torch.ones(3, dtype=torch.int64)])
def test_what_is_no_spectrum_is_refused(values):
    with pytest.raises(VectorError, match=r"expected eigenvalues \(n,\) in float32 or float64"):
        RotatedOperator(values)


def test_stress_spectra_of_few_rows_are_refused():
    with pytest.raises(OptionError, match="expected n from 20 on, got 19; leave it out for 200"):
        stress_spectra(19)
