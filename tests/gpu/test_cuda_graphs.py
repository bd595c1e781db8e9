"""Compiled and recorded products on a CUDA device are the eager ones."""

import pytest
import torch
from torch import nn

from torchlinop import EmpiricalFisherOperator, FisherOperator, GGNOperator, HessianOperator
from torchlinop.batches import tree_map
from torchlinop.errors import DataError
from torchlinop.testing import gallery
from torchlinop.testing.oracles import dense_hessian

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WAYS = {
    "cuda_graphs": {"cuda_graphs": True},
    "compile": {"compile": True},
    "both": {"compile": True, "cuda_graphs": True},
}
GRAPHS = WAYS["cuda_graphs"]


def on_gpu(problem):
    cuda = torch.Tensor.cuda
    return gallery.Problem(
        problem.model.cuda(),
        [tree_map(cuda, batch) for batch in problem.batches],
        problem.loss_fn,
        tree_map(cuda, problem.full_batch),
        problem.forward_fn,
        problem.criterion.cuda(),
    )


def hessian(p, **options):
    return HessianOperator(p.model, p.batches, p.loss_fn, **options)


def relative(A, reference):
    return float((A - reference).abs().max() / reference.abs().max())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [gallery.mlp, gallery.cnn, gallery.gpt2])
@pytest.mark.filterwarnings("ignore", "error:torch.compile failed")  # of compilers
def test_products_are_those_of_the_dense_hessian(make, way):
    p = on_gpu(make())
    expected = dense_hessian(p.full_loss, p.parameters)
    H = hessian(p, column_chunk=3, **WAYS[way])
    for seed in range(3):
        V = H.space.random(7, seed=seed)
        assert relative(H @ V, expected @ V) < 1e-11
        assert relative(H @ V[:, 0], expected @ V[:, 0]) < 1e-11


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("operator", [GGNOperator, EmpiricalFisherOperator, FisherOperator])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore", "error:torch.compile failed")  # of compilers
def test_other_matrices_are_the_eager_ones(operator, dtype, way):
    p = on_gpu(gallery.mlp(dtype))
    arguments = (p.model, p.batches, p.forward_fn, nn.CrossEntropyLoss())
    A, B = operator(*arguments), operator(*arguments, **WAYS[way])
    V = A.space.random(5)
    assert relative(B @ V, A @ V) < (1e-4 if dtype == torch.float32 else 1e-11)


def test_callers_own_what_they_get():
    H = hessian(on_gpu(gallery.mlp()), **GRAPHS)
    v = H.space.random(1)[:, 0]
    first = H @ v
    expected = first.clone()
    H @ (2 * v)
    assert torch.equal(first, expected)
    first.fill_(torch.nan)
    torch.testing.assert_close(H @ v, expected, rtol=1e-12, atol=1e-14)


def test_data_written_over_are_refused():
    p = on_gpu(gallery.mlp())
    H = hessian(p, **GRAPHS)
    v = H.space.random(1)[:, 0]
    H @ v
    p.batches[0][0].mul_(2)
    with pytest.raises(DataError, match="was written to after its first product"):
        H @ v


def test_products_on_several_streams_do_not_mix():
    H = hessian(on_gpu(gallery.mlp()), **GRAPHS)
    V = H.space.random(8)
    expected = [H @ v for v in V.unbind(1)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    for _ in range(50):
        products = []
        for i, v in enumerate(V.unbind(1)):
            with torch.cuda.stream(streams[i % 4]):
                products.append(H @ v)
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(products, expected, strict=True))


def test_memory_is_flat_over_a_thousand_products():
    H = hessian(on_gpu(gallery.mlp()), **GRAPHS)
    v = H.space.random(1)[:, 0]
    for _ in range(10):
        H @ v
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(1000):
        H @ v
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_a_replay_launches_one_graph_for_a_batch():
    p = on_gpu(gallery.mlp(sizes=(23,)))
    H = hessian(p, **GRAPHS)
    v = H.space.random(1)[:, 0]
    H @ v
    H @ v
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    # acc_events: else torch from 2.10 to 2.12 warns, although there is but one cycle.
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        H @ v
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert names.count("cudaGraphLaunch") == 1
