"""Bad input is refused before any product; products of no symmetric matrix are found out."""

import math

import numpy as np
import pytest
import torch
from eigen_spectra import F64, matrix, spectrum

from torchlinop import CountingOperator, LambdaOperator, MatrixOperator
from torchlinop.algorithms import eigen_request
from torchlinop.algorithms.lanczos import lanczos
from torchlinop.algorithms.lobpcg import lobpcg
from torchlinop.algorithms.power_iteration import deflated_power_iteration
from torchlinop.algorithms.randomized_eigh import randomized_eigh
from torchlinop.algorithms.tridiagonal import lanczos_tridiagonal
from torchlinop.errors import (
    MemoryEstimateError,
    NonFiniteError,
    OptionError,
    SymmetryError,
    VectorError,
)

EXACT = spectrum("nn", 300)  # ten positive outliers first, five negative ones last
A = matrix(EXACT)
OPERATOR = MatrixOperator(A)


def test_a_matrix_that_is_not_symmetric_is_found_out():
    B = A + 1e-3 * torch.randn(300, 300, dtype=F64)
    with pytest.raises(SymmetryError, match="<u,Av>-<v,Au>"):
        lanczos(MatrixOperator(B), 5)


def test_products_that_differ_are_found_out():
    noisy = LambdaOperator(300, lambda v: A @ v + 1e-3 * torch.randn_like(v), dtype=F64)
    with pytest.raises(SymmetryError, match="repeatability"):
        lanczos(noisy, 5)


@pytest.mark.parametrize("b", [1, 3])
def test_products_that_are_not_finite_are_found_out(b):
    products = [0]

    def matmat(V):
        products[0] += V.shape[1]
        return A @ V * (math.nan if products[0] > 10 else 1.0)

    operator = LambdaOperator(300, lambda v: matmat(v[:, None])[:, 0], matmat=matmat, dtype=F64)
    with pytest.raises(NonFiniteError, match="hold NaN or infinity, by product"):
        lanczos(operator, 5, block_size=b)
    products[0] = 0
    with pytest.raises(NonFiniteError, match="is NaN or infinite, in the first"):
        lanczos_tridiagonal(operator, torch.ones(300, dtype=F64), 20)


def test_memory_is_refused_before_it_is_taken(monkeypatch):
    monkeypatch.setattr(eigen_request, "free_bytes", lambda device: 40_000)
    counted = CountingOperator(OPERATOR)
    message = (
        r"k=10, ncv=30 needs 44 vectors x 300 x 8 B = 0.0 GB on cpu \(0.0 GB free\). "
        r'Try ncv=18 \(0.0 GB\), basis_device="cpu", basis_dtype=torch.bfloat16, or param_filter'
    )
    with pytest.raises(MemoryEstimateError, match=message):
        lanczos(counted, 10, ncv=30)
    assert counted.matvecs == 0


def test_a_short_memory_makes_the_basis_shorter(monkeypatch):
    monkeypatch.setattr(eigen_request, "free_bytes", lambda device: 33 * 300 * 8)
    result = lanczos(OPERATOR, 10, which="LA")
    assert result.basis_size == 18
    assert result.peak_bytes <= 33 * 300 * 8
    assert bool(result.converged.all())


REFUSED = [
    ({"k": 0}, "expected k from 1 to n = 300, got 0; .* torch.linalg.eigh"),
    ({"k": 301}, "expected k from 1 to n = 300, got 301"),
    ({"max_iter": 9}, "budget of products, to be at least 10 for k = 10, got 9"),
    ({"max_iter": 19, "verify": True}, "to be at least 20 for k = 10, got 19"),
    ({"max_iter": 11, "block_size": 12}, "to be at least 12 for k = 10, got 11"),
    ({"max_iter": 19, "block_size": "auto"}, "to be at least 20 for k = 10, got 19"),
    ({"which": "SM"}, "unknown which 'SM'; choose one of LM, LA, SA, BE"),
    ({"tol": -1.0}, "expected tol from 0 to 1, relative .* got -1.0"),
    ({"ncv": 10}, "expected ncv from k . 1 = 11 to n = 300, got 10"),
    ({"block_size": 0}, "expected block_size to be at least 1, or .auto., got 0"),
    ({"reorthogonalize": "selective"}, "unknown reorthogonalize 'selective'; choose one of full"),
    ({"reorthogonalize": "local", "block_size": 2}, "'local' has no blocks and no other basis"),
    ({"max_seconds": 0.0}, "expected max_seconds to be positive, got 0.0"),
    ({"basis_dtype": torch.int8}, "expected basis_dtype to be a real floating-point dtype"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_bad_options_are_refused_before_any_product(options, message):
    counted = CountingOperator(OPERATOR)
    with pytest.raises(OptionError, match=message):
        lanczos(counted, **options)
    assert counted.matvecs == 0


@pytest.mark.parametrize(
    ("v0", "message"),
    [
        (torch.ones(299, dtype=F64), r"expected v0 of shape \(300,\) or .*, got \(299, 1\)"),
        (torch.ones(300), "in torch.float64 on cpu, got .* in torch.float32"),
        (torch.zeros(300, dtype=F64), "expected a finite v0 other than zero"),
        (torch.full((300,), math.nan, dtype=F64), "expected a finite v0 other than zero"),
        (torch.ones(300, 3, dtype=F64), "at most block_size = 2 columns, got 3"),
    ],
)
def test_bad_starts_are_refused_before_any_product(v0, message):
    counted = CountingOperator(OPERATOR)
    with pytest.raises(VectorError, match=message):
        lanczos(counted, 5, v0=v0, block_size=2)
    assert counted.matvecs == 0


@pytest.mark.parametrize(
    "solver",
    [lanczos, lobpcg, deflated_power_iteration, randomized_eigh],
)
@pytest.mark.parametrize("seed", [-1, 0.5])
def test_what_is_no_seed_is_refused_before_any_product(solver, seed):
    counted = CountingOperator(OPERATOR)
    with pytest.raises(OptionError, match=f"expected seed to be an integer from 0 on, got {seed}"):
        solver(counted, 3, seed=seed)
    assert counted.matvecs == 0


@pytest.mark.parametrize(
    "solver",
    [lanczos, lobpcg, deflated_power_iteration, randomized_eigh],
)
def test_integers_of_numpy_are_seeds_which_results_hold_as_int(solver):
    result = solver(OPERATOR, 3, seed=np.int64(7))
    assert type(result.seed) is int
    assert torch.equal(result.eigenvalues, solver(OPERATOR, 3, seed=7).eigenvalues)
