"""Vectors on several ranks: products of long vectors, random numbers, agreement, exchanges."""

import math
import os
import signal
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from problems import mlp, of_rank
from processes import failures, on_ranks
from sharded_matrices import ShardedMatrix, matrix, spectrum, uneven
from torch.distributed.tensor.debug import CommDebugMode

from torchlinop import HessianOperator, MatrixOperator, as_linear_operator, lanczos
from torchlinop.algorithms.products import run_of_products
from torchlinop.distributed import data_parallel
from torchlinop.distributed.sharded_space import ShardedSpace
from torchlinop.distributed.split_vectors import over_replicas, split_over
from torchlinop.errors import DivergenceError
from torchlinop.piece import Piece
from torchlinop.random_column import CHUNK, RandomColumn, gaussian
from torchlinop.space import VectorSpace

CPU = torch.device("cpu")
MANY = 2 * CHUNK + 12_345


def whole_block(n, columns, dtype=torch.float64):
    return VectorSpace(n, dtype, CPU).random(columns, 4)


def test_a_part_of_a_random_column_is_the_part_of_the_column():
    column = RandomColumn(MANY, 3, 1, gaussian)
    whole = torch.cat(list(column.chunks()))
    for part in (
        torch.arange(0),
        torch.arange(70_000, 140_000),
        torch.tensor([0, 5, CHUNK - 1, CHUNK, MANY - 1]),
        torch.arange(3, MANY, 977),
    ):
        assert torch.equal(column.at(part), whole[part])


def test_the_first_chunk_has_the_stream_of_short_vectors():
    stream = np.random.SeedSequence(7, spawn_key=(2,)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(stream[0]) >> 1)
    expected = torch.randn(50, generator=generator, dtype=torch.float64)
    assert torch.equal(VectorSpace(50, torch.float64, CPU).random(3, 7)[:, 2], expected)


def test_chunks_are_independent():
    chunks = list(RandomColumn(3 * CHUNK, 3, 1, gaussian).chunks())
    correlation = torch.corrcoef(torch.stack(chunks))
    assert (correlation - torch.eye(3)).abs().max() < 5 / CHUNK**0.5


def test_indices_of_a_piece_are_those_of_the_tensor():
    of_tensor = torch.arange(5 * 7 * 4).view(5, 7, 4) + 11
    piece = Piece(11, (5, 7, 4), (((1, 2), (3, 5)), ((0, 7),), ((2, 3),)))
    expected = of_tensor[[1, 3, 4]][:, :, 2:3]
    assert piece.local_shape == expected.shape
    assert torch.equal(piece.indices(0, piece.numel), expected.flatten())
    assert torch.equal(piece.indices(4, 9), expected.flatten()[4:9])
    assert torch.equal(Piece.whole(3, ()).indices(0, 1), torch.tensor([3]))


def facts():
    found = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.complex128):
        space = uneven(dtype=dtype)
        X = space.scatter(whole_block(space.size, 3, dtype))
        found[dtype] = space.inner(X, X[:, :2]), space.norm(X), space.gather(X)
    space = uneven()
    v = space.scatter(whole_block(space.size, 1))
    extreme = {s: space.norm(v * s) for s in (1e-140, 1e140, 0.0, math.inf)}
    long = uneven(MANY, 900)
    drawn = {d: long.gather(long.random(2, 5, d)) for d in ("gaussian", "rademacher", "sphere")}
    return {
        "products": found,
        "extreme": extreme,
        "random": drawn,
        "units": space.gather(space.unit_vectors(5, 30)),
        "largest": space.largest_entry(v * 2),
        "not a number": float(space.largest_entry(v * math.nan)),
        "agree": [space.agree(dist.get_rank() == 1), space.agree(False), space.agree(True)],
        "least": space.least(3.5 - dist.get_rank()),
        "rows": space.local_size,
        "equal": (space == uneven(), space == uneven(dtype=torch.float32), hash(space) != 0),
    }


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shards_have_the_products_and_random_numbers_of_whole_vectors(world_size):
    everywhere = on_ranks(world_size, facts)
    for rank, found in enumerate(everywhere):
        for dtype, (inner, norm, gathered) in found["products"].items():
            space = uneven_whole(dtype)
            X = whole_block(space.size, 3, dtype)
            assert torch.equal(gathered, X)
            torch.testing.assert_close(inner, space.inner(X, X[:, :2]), rtol=1e-6, atol=1e-5)
            torch.testing.assert_close(norm, space.norm(X), rtol=1e-6, atol=0)
            assert torch.equal(inner, everywhere[0]["products"][dtype][0])
            assert torch.equal(norm, everywhere[0]["products"][dtype][1])
        v = whole_block(60, 1)
        for scale, norm in found["extreme"].items():
            expected = v.norm() * scale if math.isfinite(scale) else torch.tensor(math.inf)
            torch.testing.assert_close(norm[0], expected.double(), rtol=1e-13, atol=0)
        for distribution, drawn in found["random"].items():
            plain = VectorSpace(MANY, torch.float64, CPU).random(2, 5, distribution)
            torch.testing.assert_close(drawn, plain, rtol=1e-14, atol=0)
        assert torch.equal(found["units"], torch.eye(60, dtype=torch.float64)[:, 5:30])
        assert float(found["largest"]) == float(2 * v.abs().max())
        assert found["not a number"] == math.inf
        assert found["agree"] == [world_size > 1, False, True]
        assert found["least"] == 3.5 - (world_size - 1)
        assert found["equal"] == (True, False, True)
        assert (found["rows"] == 7) == (world_size == 4 and rank == 3)  # the replicated ones alone


def uneven_whole(dtype):
    return VectorSpace(60, dtype, CPU)


def no_entry_on_a_rank():
    first = dist.get_rank() == 0
    piece = Piece(0, (60,), (((0, 60 if first else 0),),))
    space = ShardedSpace(60, torch.float64, CPU, (piece,), piece.numel)
    found = lanczos(ShardedMatrix(matrix(), space), 2)
    return space.local_size, found.eigenvalues


def test_a_rank_may_have_no_entry_at_all():
    (rows, values), (none, same) = on_ranks(2, no_entry_on_a_rank)
    assert (rows, none) == (60, 0)
    assert torch.equal(values, same)
    torch.testing.assert_close(values, torch.tensor([50.0, 33.0]).double())


def exchanges(steps, **options):
    """All-reduces of ``steps`` Lanczos steps, without those of the products and the ends."""

    def counted(max_iter):
        op = ShardedMatrix(matrix(), uneven())
        with CommDebugMode() as mode:
            lanczos(op, 8, max_iter, tol=0, **options)
        assert op.products == max_iter
        return mode.get_total_counts() - op.products

    return counted(10 + steps) - counted(10)


@pytest.mark.filterwarnings("ignore")
def test_a_lanczos_step_costs_two_small_all_reduces():
    for count in on_ranks(2, exchanges, 20, ncv=50):
        assert count <= 2 * 20
    for count in on_ranks(2, exchanges, 20, reorthogonalize="none"):
        assert count <= 2 * 20


def late_on_one_rank():
    op = ShardedMatrix(matrix(), uneven())
    with run_of_products(op, max_seconds=0.05) as products:
        products(op.space.random(1))
        if dist.get_rank() == 1:
            time.sleep(0.1)
            assert products.seconds > 0.05
        return products.late


def test_all_ranks_stop_when_time_is_over_on_one():
    assert on_ranks(2, late_on_one_rank) == [True, True]


class _InterruptedMatrix(ShardedMatrix):
    """Rank 1 alone gets a signal in a product."""

    def _matmat(self, V):
        if self.products == 6 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return super()._matmat(V)


def interrupted_on_one_rank(dtype):
    op = _InterruptedMatrix(matrix(), uneven(dtype=dtype))
    handler = signal.getsignal(signal.SIGINT)
    found = lanczos(op, 2, ncv=20, tol=1e-6)
    assert signal.getsignal(signal.SIGINT) is handler
    return found.status, found.matvecs, found.eigenvalues


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_all_ranks_are_interrupted_where_one_is(dtype):
    first, second = on_ranks(2, interrupted_on_one_rank, dtype)
    assert first[:2] == second[:2] == ("interrupted", 7)
    assert torch.equal(first[2], second[2])


def interrupted_after_the_last_sum():
    op = ShardedMatrix(matrix(), uneven())
    with run_of_products(op):
        os.kill(os.getpid(), signal.SIGINT)


def test_an_interruption_without_a_sum_is_raised_at_the_end():
    assert {kind for kind, _ in failures(2, interrupted_after_the_last_sum)} == {
        "KeyboardInterrupt"
    }


def splits():
    op = MatrixOperator(matrix())
    split = over_replicas(op)
    found = lanczos(split, 3, which="LA")
    space = split.space
    V = whole_block(60, 2)
    return {
        "rows": space.local_size,
        "product": space.gather(split @ space.scatter(V)),
        "values": found.eigenvalues,
        "basis": found.eigenvectors.shape,
    }


@pytest.mark.parametrize("world_size", [2, 4])
def test_replicas_share_the_memory_of_vectors(world_size):
    for found in on_ranks(world_size, splits):
        assert found["rows"] == 60 / world_size
        assert found["basis"] == (60 / world_size, 3)
        V = whole_block(60, 2)
        torch.testing.assert_close(found["product"], matrix() @ V, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(found["values"], spectrum()[-3:].flip(0))


def problem_of_rank():
    problem = mlp()
    return problem, of_rank(problem, dist.get_rank(), dist.get_world_size())


def split_hessian():
    problem, batches = problem_of_rank()
    op = data_parallel(HessianOperator(problem.model, batches, problem.loss_fn))
    split = over_replicas(op)
    V = whole_block(op.size, 2, op.dtype)
    local = split.space.scatter(V)
    with CommDebugMode() as mode:
        product = split @ local
    names = {str(name).rsplit(".", maxsplit=1)[-1]: n for name, n in mode.comm_counts.items()}
    return split.space.gather(product), op @ V, names, split.space.local_size


def test_a_product_of_split_vectors_is_a_gather_and_a_scattered_sum():
    for split, whole, counts, rows in on_ranks(2, split_hessian):
        torch.testing.assert_close(split, whole, rtol=1e-13, atol=1e-14)
        assert rows == math.ceil(len(whole) / 2) or rows == len(whole) // 2
        assert sum(counts.values()) == 3, counts


def fails_on_one_rank():
    problem, batches = problem_of_rank()
    op = HessianOperator(problem.model, batches, problem.loss_fn)
    split = over_replicas(data_parallel(op))
    if dist.get_rank() == 1:

        def broken(*args):
            raise ValueError("no such layer")

        problem.model.forward = broken
    split @ split.space.random(1)


def test_a_failure_on_one_rank_is_raised_by_all():
    for _, message in failures(2, fails_on_one_rank):
        assert "no such layer" in message


def wrong_uses():
    op = ShardedMatrix(matrix(), uneven())
    with pytest.raises(ValueError, match="its vectors are split already: pass it"):
        over_replicas(op)
    with pytest.raises(ValueError, match="has shards of them; pass param_filter where it is built"):
        op.restrict(torch.arange(3))
    with pytest.raises(ValueError, match=r"expected a vector of shape \(\d+,\), got \(60,\)"):
        op @ torch.ones(60, dtype=torch.float64)
    with pytest.raises(ValueError, match="expected operators on one space"):
        op + over_replicas(MatrixOperator(matrix()))
    with pytest.raises(DivergenceError, match="passed different vectors to a product"):
        as_linear_operator(op) @ np.full(60, float(dist.get_rank()))
    return split_over(61, torch.float32, CPU).local_size


def test_what_needs_whole_vectors_is_refused():
    assert on_ranks(2, wrong_uses) == [31, 30]
