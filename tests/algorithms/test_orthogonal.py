"""Bases are orthonormal and products with them those of the dense columns, wherever they are."""

import pytest
import torch

from torchlinop import VectorSpace
from torchlinop.algorithms.basis import Basis
from torchlinop.algorithms.orthogonal import complete, orthonormalize, random_block

CPU = torch.device("cpu")
SPACE = VectorSpace(500, torch.float64, CPU)
DTYPES = [torch.float64, torch.float32, torch.complex128]


def block(columns, dtype=torch.float64, seed=0):
    return VectorSpace(500, dtype, CPU).random(columns, seed).mT.contiguous().mT


def loss(Q):
    return float((Q.mH @ Q - torch.eye(Q.shape[1])).abs().max())


def basis_of(Q, dtype=None, capacity=20):
    basis = Basis(SPACE, Q, capacity, dtype=dtype, device=None)
    basis.put(0, Q)
    return basis


@pytest.mark.parametrize("dtype", DTYPES)
def test_q_is_orthonormal_and_q_r_is_the_block(dtype):
    W = block(4, dtype)
    W[:, 3] = W[:, 0] + 1e-5 * W[:, 3]  # nearly dependent
    Q = W.clone()
    R = orthonormalize(SPACE, Q, 0.0)
    eps = torch.finfo(dtype).eps
    assert loss(Q) < 20 * eps
    torch.testing.assert_close(Q @ R.to(dtype), W, rtol=0, atol=100 * eps)
    assert torch.equal(R, R.triu())


def test_dependent_columns_become_zero_and_so_do_their_rows():
    W = block(3)
    W[:, 1] = 2 * W[:, 0]
    Q = W.clone()
    R = orthonormalize(SPACE, Q, 1e-10)
    assert torch.equal(Q[:, 1], torch.zeros(500, dtype=torch.float64))
    assert torch.equal(R[1], torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(Q @ R, W)


@pytest.mark.parametrize("size", [0, 5])
def test_completion_is_orthonormal_to_all_there_is(size):
    Q = block(7)
    orthonormalize(SPACE, Q, 0.0)
    basis = basis_of(Q[:, :5])
    completed = complete(basis, size, Q[:, 5:], 3, seed=1, draw=2)
    assert torch.equal(completed[:, :2], Q[:, 5:])
    assert loss(torch.cat([Q[:, :size], completed], dim=1)) < 1e-14


def test_completion_fills_the_last_dimension_of_a_space():
    space = VectorSpace(6, torch.float64, CPU)
    Q = torch.linalg.qr(space.random(5)).Q
    basis = Basis(space, Q, 6, dtype=None, device=None)
    basis.put(0, Q)
    last = complete(basis, 5, Q[:, :0], 1, seed=0, draw=0)
    assert loss(torch.cat([Q, last], dim=1)) < 1e-14


# Rounding to bfloat16 is by up to 2^-9, to float16 by 2^-12, of entries of like size.
@pytest.mark.parametrize(
    ("stored", "tolerance"), [(None, 1e-15), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
def test_stored_columns_are_those_put_in(stored, tolerance):
    Q = torch.linalg.qr(block(12)).Q
    basis = basis_of(Q, stored)
    X = basis.columns(0, 12)
    assert X.dtype == torch.float64
    torch.testing.assert_close(X, Q, rtol=tolerance, atol=tolerance * 1e-3)


@pytest.mark.parametrize("stored", [None, torch.bfloat16, torch.float16])
def test_products_with_the_basis_are_those_with_its_columns(stored):
    basis = basis_of(torch.linalg.qr(block(12)).Q, stored)
    V, W, Y = basis.columns(0, 12), block(2, seed=1), block(3, seed=2)[:12]
    torch.testing.assert_close(basis.combine(Y), V @ Y)
    rest = W.clone()
    H = basis.project(rest, 11, 2)
    torch.testing.assert_close(H, V[:, 2:11].T @ W)
    torch.testing.assert_close(rest, W - V[:, 2:11] @ (V[:, 2:11].T @ W))


def test_rotation_replaces_the_first_columns_by_combinations_of_all():
    Q = torch.linalg.qr(VectorSpace(5000, torch.float64, CPU).random(8)).Q  # more than a chunk
    basis = Basis(SPACE, Q, 8, dtype=None, device=None)
    basis.put(0, Q)
    Y = torch.linalg.qr(block(3)[:8]).Q
    basis.rotate(Y)
    torch.testing.assert_close(basis.columns(0, 3), Q @ Y)
    assert torch.equal(basis.columns(3, 8), Q[:, 3:])


def test_half_precision_keeps_small_entries_that_float16_alone_would_lose():
    n = 2**18
    q = torch.full((n, 1), n**-0.5)
    q[1:] *= 1e-3  # 2e-6, where float16 has steps of 6e-8
    basis = Basis(VectorSpace(n, torch.float32, CPU), q, 1, dtype=torch.float16, device=None)
    basis.put(0, q)
    error = ((basis.columns(0, 1) - q) / q).abs().max()
    assert float(error) < 2**-11 < 2**-8 < float(((q.half() - q) / q).abs().max())


def test_draws_of_a_seed_and_seeds_of_a_draw_are_independent():
    draws = [random_block(SPACE, 2, seed, draw) for seed in (0, 1) for draw in (0, 1)]
    V = torch.cat(draws, dim=1)
    cosines = SPACE.inner(V, V) / 500
    assert float((cosines - torch.eye(8)).abs().max()) < 5 * 500**-0.5 * 2**0.5
