"""Softmax regression on the digits at W = 0: GGN = Hessian = Fisher = XᵀX/N ⊗ (I − 11ᵀ/C)/C."""

import functools

import pytest
import scipy.sparse.linalg as sla
import torch
from sklearn.datasets import load_digits
from torch import nn

from torchlinop import HessianOperator, as_linear_operator
from torchlinop.operators.fisher import FisherOperator
from torchlinop.operators.gauss_newton import GGNOperator
from torchlinop.testing.gallery import cross_entropy, in_batches, of_inputs
from torchlinop.testing.oracles import softmax_regression_hessian

MATRICES = {
    "Hessian": lambda model, data: HessianOperator(model, data, cross_entropy),
    "GGN": lambda model, data: GGNOperator(model, data, of_inputs, nn.CrossEntropyLoss()),
    "Fisher": lambda model, data: FisherOperator(model, data, of_inputs, nn.CrossEntropyLoss()),
}


@functools.cache
def digits():
    images = load_digits()
    return torch.tensor(images.data / 16), torch.tensor(images.target)


@functools.cache
def operator(matrix):
    model = nn.Linear(64, 10, bias=False).double()
    nn.init.zeros_(model.weight)
    return MATRICES[matrix](model, in_batches(digits(), *(256,) * 7, 5))


@functools.cache
def spectrum(matrix):
    return torch.linalg.eigvalsh(operator(matrix).to_dense()).flip(0)


@pytest.mark.parametrize("matrix", MATRICES)
def test_matrix_is_its_closed_form(matrix):
    X, _ = digits()
    closed_form = softmax_regression_hessian(X, torch.zeros(10, 64).double())
    error = (operator(matrix).to_dense() - closed_form).abs().max()
    assert error < 1e-12 * closed_form.abs().max()


@pytest.mark.parametrize("matrix", MATRICES)
def test_eigenvalues_are_a_tenth_of_those_of_the_second_moments_nine_times_each(matrix):
    X, _ = digits()
    tenth = torch.linalg.eigvalsh(X.T @ X / len(X)).flip(0) / 10
    expected = torch.cat([tenth.repeat_interleave(9), torch.zeros(64).double()])
    assert (spectrum(matrix) - expected.sort(descending=True)[0]).abs().max() < 1e-14 * 64


@pytest.mark.parametrize("matrix", MATRICES)
def test_the_largest_eigenvalue_has_multiplicity_nine_then_comes_a_gap(matrix):
    assert spectrum(matrix)[:9] == pytest.approx([1.045530] * 9, abs=5e-7)
    assert float(spectrum(matrix)[9]) == pytest.approx(0.069883, abs=5e-7)


@pytest.mark.parametrize("matrix", MATRICES)
def test_trace_and_rank_are_those_of_the_kronecker_factors(matrix):
    eigenvalues = spectrum(matrix)
    assert float(eigenvalues.sum()) == pytest.approx(13.512779, abs=5e-7)
    assert int((eigenvalues > 1e-12 * eigenvalues[0]).sum()) == 9 * 61  # three pixels are blank
    assert len(eigenvalues) - 549 == 91


@pytest.mark.parametrize("matrix", MATRICES)
def test_eigsh_finds_the_multiple_eigenvalue(matrix):
    A = as_linear_operator(operator(matrix))
    v0 = operator(matrix).space.random(1)[:, 0].numpy()
    eigenvalues = sla.eigsh(A, k=10, v0=v0, return_eigenvectors=False)
    assert eigenvalues == pytest.approx([0.069883, *[1.045530] * 9], abs=5e-7)
