"""Products on side streams and from threads, and that what protects them is needed."""

import threading

import numpy as np
import pytest
import torch
from on_device import DEVICE, anywhere, moved, only_cuda, relative

from torchlinop import GGNOperator, HessianOperator, LambdaOperator, as_linear_operator
from torchlinop.testing import gallery
from torchlinop.testing.oracles import dense_hessian

pytestmark = anywhere


def slow(n, cycles):
    """2 v, after so many cycles of the device."""

    def product(v):
        torch.cuda._sleep(cycles)
        return 2 * v

    return LambdaOperator(n, product, dtype=torch.float64, device=DEVICE)


def ggn(p, **options):
    return GGNOperator(p.model, p.batches, p.forward_fn, p.criterion, **options)


def hessian(p, **options):
    return HessianOperator(p.model, p.batches, p.loss_fn, **options)


@only_cuda
@pytest.mark.parametrize("build", [hessian, ggn])
@pytest.mark.parametrize("linearization", ["keep", "rebuild"])
def test_products_on_another_stream_are_those_of_the_default_stream(build, linearization):
    A = build(moved(gallery.mlp()), linearization=linearization)
    V = A.space.random(3)
    expected = A @ V  # with "keep", the graphs are made on this stream
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = [A @ V for _ in range(100)]
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(AV, expected) for AV in found)


@only_cuda
def test_graphs_made_on_a_side_stream_serve_the_default_stream():
    p = moved(gallery.mlp())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        H = hessian(p, linearization="keep")
        V = H.space.random(2)
        expected = H @ V
    torch.cuda.current_stream().wait_stream(side)
    torch.testing.assert_close(H @ V, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("linearization", ["keep", "rebuild"])
def test_threads_share_an_operator(linearization):
    p = gallery.mlp()
    D, H = dense_hessian(p.full_loss, p.parameters), hessian(moved(p), linearization=linearization)
    errors = []

    def multiply(seed):
        V = H.space.random(2, seed=seed)
        errors.extend(relative(H @ V, D @ V.cpu()) for _ in range(10))

    threads = [threading.Thread(target=multiply, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 40
    assert max(errors) < 1e-10


N = 1 << 18
CYCLES = 100_000_000  # tens of milliseconds


def read_through_the_host():
    """The second of two products; memory of the first is free to be used again."""
    A = as_linear_operator(slow(N, CYCLES))
    A @ np.full(N, 1.0)
    return A @ np.full(N, 5.0)


@only_cuda
def test_product_has_arrived_when_the_host_reads_it():
    assert bool((read_through_the_host() == 10).all())


@only_cuda
def test_without_waiting_it_has_not_arrived(monkeypatch):
    # Else the test above would prove nothing.
    monkeypatch.setattr(torch.cuda.Stream, "synchronize", lambda stream: None)
    early = read_through_the_host().copy()
    torch.cuda.synchronize()
    assert not bool((early == 10).all())


@only_cuda
def test_vector_may_be_overwritten_as_soon_as_its_product_is_there():
    A, x = as_linear_operator(slow(N, 1000)), np.empty(N)
    for i in range(100):
        x[:] = i
        y = A @ x
        x[:] = -1
        assert y[0] == y[-1] == 2 * i
