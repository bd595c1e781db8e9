"""Solvers of other libraries on rank 0, or on every rank alike, with the products of all ranks."""

import os
import signal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from problems import mlp, of_rank, union
from processes import failures, on_ranks
from scipy.sparse.linalg import cg, eigsh

from torchlinop import HessianOperator, as_linear_operator, lanczos
from torchlinop.bench.collectives import Collectives
from torchlinop.distributed import data_parallel, drive


def hessian(linearization="keep", loss_fn=None):
    p = mlp()
    batches = of_rank(p, dist.get_rank(), dist.get_world_size())
    return data_parallel(HessianOperator)(
        p.model, batches, loss_fn or p.loss_fn, linearization=linearization
    )


def of_one_process(world_size):
    p = mlp()
    return HessianOperator(p.model, union(p, world_size), p.loss_fn)


def three_largest(A):
    return eigsh(as_linear_operator(A), k=3, which="LA", tol=1e-14, rng=0)


def driven():
    values, vectors = drive(hessian(), three_largest)
    solution, info = drive(
        hessian(), lambda A: cg(as_linear_operator(A.shift(1.0)), np.ones(A.size), rtol=1e-13)
    )
    with Collectives() as collectives:
        drive(op := hessian(), lambda A: float((A @ torch.ones(A.size, 2).double()).sum()))
    return values, vectors, solution, info, op.size, collectives.of_kind("broadcast")


@pytest.mark.parametrize("world_size", [2, 3])
def test_eigsh_and_cg_on_rank_0_give_all_ranks_the_answer_of_one_process(world_size):
    alone = of_one_process(world_size)
    H = alone.to_dense().numpy()
    expected = np.linalg.eigvalsh(H)[-3:]
    first, *others = on_ranks(world_size, driven)
    values, vectors, solution, info, n, sent = first
    assert info == 0
    assert abs(values - expected).max() <= 1e-12
    assert abs(H @ vectors - vectors * values).max() <= 1e-12
    assert abs(H @ solution + solution - 1).max() <= 1e-11
    assert sent[:3] == [24, 16 * n, 24]  # columns, V, release
    for other in others:
        assert np.array_equal(other[0], values)
        assert np.array_equal(other[2], solution)


def on_every_rank(different_starts):
    v0 = np.random.default_rng(dist.get_rank() if different_starts else 0).standard_normal(53)
    return eigsh(as_linear_operator(hessian()), k=3, which="LA", tol=1e-14, v0=v0)[0]


def test_the_same_solver_with_one_start_on_every_rank_gives_one_answer():
    expected = np.linalg.eigvalsh(of_one_process(2).to_dense().numpy())[-3:]
    for values in on_ranks(2, on_every_rank, False):
        assert abs(values - expected).max() <= 1e-12


def test_solvers_that_start_differently_are_told_to_use_drive():
    told = failures(2, on_every_rank, True)
    assert told[0] == told[1]
    assert told[0][0] == "DivergenceError"
    assert "drive(op, solver)" in told[0][1]


def loss_of_rank_1_fails(model, batch):
    if dist.get_rank() == 1 and loss_of_rank_1_fails.armed:
        raise FloatingPointError("a loss of rank 1")
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])


loss_of_rank_1_fails.armed = False


def raises(where):
    op = hessian("rebuild", loss_of_rank_1_fails)

    def function(A):
        loss_of_rank_1_fails.armed = where == "product"
        if where == "solver":
            raise ZeroDivisionError("of the solver")
        if where == "result":
            return iter(three_largest(A)), lambda: None
        return three_largest(A)

    loss_of_rank_1_fails.armed = where == "product"
    drive(op, function)


@pytest.mark.parametrize(
    ("where", "kind", "sentence"),
    [
        ("product", "FloatingPointError", "on rank 1 of 2: a loss of rank 1"),
        ("solver", "ZeroDivisionError", "on rank 0 of 2: of the solver"),
        ("result", "OptionError", "on rank 0 of 2: expected function to return what can be sent"),
    ],
)
def test_an_error_anywhere_ends_all_ranks_with_its_cause(where, kind, sentence):
    told = failures(2, raises, where)
    assert told[0] == told[1]
    assert told[0][0] == kind
    assert told[0][1].startswith(sentence)


def goes_on_after_an_error():
    op = hessian("rebuild", loss_of_rank_1_fails)
    loss_of_rank_1_fails.armed = True

    def function(A):
        try:
            A @ torch.ones(A.size).double()
        except FloatingPointError:
            return "went on"

    return drive(op, function)


def test_an_error_that_the_solver_handles_is_no_error():
    assert on_ranks(2, goes_on_after_an_error) == ["went on"] * 2


def interrupted(on_rank):
    products = []

    def loss_fn(model, batch):
        if len(products) == 5 and dist.get_rank() == on_rank:
            os.kill(os.getpid(), signal.SIGINT)
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    op = hessian("rebuild", loss_fn)
    multiply = op._matmat
    op._matmat = lambda V: products.append(V) or multiply(V)
    try:
        drive(op, lambda A: eigsh(as_linear_operator(A), k=20, which="LA", tol=0, rng=0))
    except BaseException as error:
        told = type(error).__name__
    # All of them can go on together.
    return told, drive(hessian(), lambda A: A.size)


@pytest.mark.parametrize("on_rank", [0, 1])
def test_an_interruption_ends_all_ranks_after_a_product(on_rank):
    assert on_ranks(2, interrupted, on_rank) == [("KeyboardInterrupt", 53)] * 2


def of_our_own():
    return drive(hessian(), lambda A: lanczos(A, k=2, tol=1e-12).eigenvalues)


def test_our_solvers_can_be_driven_too():
    expected = torch.linalg.eigvalsh(of_one_process(2).to_dense())
    largest = expected[expected.abs().argsort(descending=True)][:2]
    for values in on_ranks(2, of_our_own):
        assert (values - largest).abs().max() <= 1e-12
