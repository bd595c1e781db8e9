"""Sizes are integers of any type; what is none is named before any product."""

import numpy as np
import pytest
import torch

from torchlinop import (
    CountingOperator,
    LanczosConfig,
    MatrixOperator,
    apply_function,
    conjugate_gradient,
    deflated_power_iteration,
    extremal_eigenvalues,
    hutchinson,
    inverse,
    lanczos,
    lanczos_tridiagonal,
    lobpcg,
    logdet,
    minres,
    norm,
    nystrom,
    randomized_eigh,
    slq,
    spectral_density,
    stochastic_power_iteration,
    trace,
)
from torchlinop.errors import OptionError

A = torch.diag(torch.arange(1.0, 31.0, dtype=torch.float64))
b = torch.ones(30, dtype=torch.float64)

CALLS = [
    ("k", lambda op, m: lanczos(op, m)),
    ("max_iter", lambda op, m: lanczos(op, 2, m)),
    ("ncv", lambda op, m: lanczos(op, 2, ncv=m)),
    ("guard", lambda op, m: lobpcg(op, 2, guard=m)),
    ("k", lambda op, m: lobpcg(op, m)),
    ("max_iter", lambda op, m: deflated_power_iteration(op, 1, m)),
    ("oversampling", lambda op, m: randomized_eigh(op, 2, oversampling=m)),
    ("rank", lambda op, m: nystrom(op, m)),
    ("num_matvecs", lambda op, m: trace(op, m)),
    ("num_matvecs", lambda op, m: norm(op, num_matvecs=m)),
    ("num_matvecs", lambda op, m: extremal_eigenvalues(op, m)),
    ("num_probes", lambda op, m: slq(op, m, 5)),
    ("num_steps", lambda op, m: slq(op, 2, m)),
    ("max_iter", lambda op, m: conjugate_gradient(op, b, max_iter=m)),
    ("steps", lambda op, m: apply_function(op, torch.exp, b, steps=m)),
    ("steps", lambda op, m: lanczos_tridiagonal(op, b, m)),
]


@pytest.mark.parametrize(("name", "call"), CALLS)
@pytest.mark.parametrize("size", [12.0, np.float64(12), "12"])
def test_what_is_no_integer_is_refused_by_name(name, call, size):
    counted = CountingOperator(MatrixOperator(A))
    with pytest.raises(OptionError, match=rf"expected {name} to be an integer, got .*12.*; round"):
        call(counted, size)
    assert counted.matvecs == 0


@pytest.mark.filterwarnings("ignore::torchlinop.errors.NotConvergedWarning")
@pytest.mark.parametrize(("name", "call"), CALLS)
def test_integers_of_numpy_are_integers(name, call):
    counted = CountingOperator(MatrixOperator(A))
    call(counted, np.int64(12))
    assert counted.matvecs > 0


def test_a_block_may_be_as_wide_as_an_integer_of_numpy():
    result = lanczos(MatrixOperator(A), 3, block_size=np.int64(3))
    assert result.matvecs == 3 * result.matmats
    with pytest.raises(OptionError, match=r'block_size to be at least 1, or "auto", got 3\.0'):
        lanczos(MatrixOperator(A), 3, block_size=3.0)


MORE = [
    *CALLS,
    ("max_iter", lambda op, m: lobpcg(op, 2, m)),
    ("num_matvecs", lambda op, m: hutchinson(op, m)),
    ("num_probes", lambda op, m: logdet(op, num_probes=m)),
    ("num_grid_points", lambda op, m: spectral_density(op, 2, 5, m)),
    ("num_probes", lambda op, m: LanczosConfig(num_probes=m)),
    ("steps", lambda op, m: stochastic_power_iteration([op], m)),
]


@pytest.mark.parametrize(("name", "call"), MORE)
@pytest.mark.parametrize("size", [True, [1, 2], torch.ones(3), torch.tensor(12), np.ones(3)])
def test_truth_values_tensors_and_arrays_are_no_integers(name, call, size):
    counted = CountingOperator(MatrixOperator(A))
    with pytest.raises(OptionError, match=f"expected {name} to be an integer, got"):
        call(counted, size)
    assert counted.matvecs == 0


def test_a_number_of_pairs_is_not_left_out_by_none():
    for algorithm in (lanczos, lobpcg, deflated_power_iteration, randomized_eigh):
        with pytest.raises(OptionError, match="expected k to be an integer, got None"):
            algorithm(MatrixOperator(A), None)


NUMBERS = [
    ("tol", lambda op, x: lanczos(op, 2, tol=x)),
    ("tol", lambda op, x: lobpcg(op, 2, tol=x)),
    ("tol", lambda op, x: randomized_eigh(op, 2, tol=x)),
    ("momentum", lambda op, x: deflated_power_iteration(op, 2, momentum=x)),
    ("tail", lambda op, x: stochastic_power_iteration([op], tail=x)),
    ("rtol", lambda op, x: trace(op, rtol=x)),
    ("rtol", lambda op, x: conjugate_gradient(op, b, rtol=x)),
    ("rtol", lambda op, x: apply_function(op, torch.exp, b, rtol=x)),
    ("damping", lambda op, x: conjugate_gradient(op, b, damping=x)),
    ("damping", lambda op, x: inverse(op, x)),
    ("damping", lambda op, x: logdet(op, damping=x)),
    ("max_seconds", lambda op, x: minres(op, b, max_seconds=x)),
    ("max_seconds", lambda op, x: inverse(op, max_seconds=x)),
    ("shift", lambda op, x: nystrom(op, 3, shift=x)),
    ("regularization", lambda op, x: LanczosConfig(regularization=x)),
]


@pytest.mark.parametrize(("name", "call"), NUMBERS)
@pytest.mark.parametrize("value", ["0.1", True, [0.1], torch.tensor(0.1), np.ones(3)])
def test_strings_truth_values_and_tensors_are_no_numbers(name, call, value):
    counted = CountingOperator(MatrixOperator(A))
    with pytest.raises(OptionError, match=f"expected {name} to be a number, got .*; pass a float"):
        call(counted, value)
    assert counted.matvecs == 0


@pytest.mark.parametrize("value", [np.float64(0.25), np.float32(0.25)])
def test_numbers_of_numpy_are_numbers(value):
    assert lanczos(MatrixOperator(A), 2, tol=value).tol == 0.25
