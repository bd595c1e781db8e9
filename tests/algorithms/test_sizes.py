"""Sizes are integers of any type; what is none is named before any product."""

import numpy as np
import pytest
import torch

from torchlinop import (
    CountingOperator,
    MatrixOperator,
    apply_function,
    conjugate_gradient,
    deflated_power_iteration,
    extremal_eigenvalues,
    lanczos,
    lanczos_tridiagonal,
    lobpcg,
    norm,
    nystrom,
    randomized_eigh,
    slq,
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
