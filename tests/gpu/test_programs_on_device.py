"""Kept products that are compiled, or captured as CUDA graphs, are the eager ones."""

import pytest
import torch
from on_device import DEVICE, anywhere, moved, only_cuda, relative
from torch import nn

from torchlinop import GGNOperator, HessianOperator, lanczos
from torchlinop.bench.variants import keywords
from torchlinop.testing import gallery
from torchlinop.testing.oracles import dense_ggn, dense_hessian

pytestmark = anywhere

WAYS = [
    pytest.param({"compile": True}, id="compile"),
    pytest.param({"cuda_graphs": True}, id="cuda_graphs", marks=only_cuda),
    pytest.param({"compile": True, "cuda_graphs": True}, id="both", marks=only_cuda),
]


def ways(test):
    """Each way; what compilers warn of is theirs, but for a failure."""
    theirs = pytest.mark.filterwarnings("ignore", "error:torch.compile failed")
    return pytest.mark.parametrize("options", WAYS)(theirs(test))


def hessian(p, **options):
    return HessianOperator(p.model, p.batches, p.loss_fn, linearization="keep", **options)


def ggn(p, **options):
    options = {"linearization": "keep", **options}
    return GGNOperator(p.model, p.batches, p.forward_fn, nn.CrossEntropyLoss(), **options)


def offered(options, operator=HessianOperator):
    missing = set(options) - keywords(operator)
    if missing:
        pytest.skip(f"{operator.__name__} has no keyword {', '.join(missing)}")


@ways
@pytest.mark.parametrize("make", [gallery.mlp, gallery.cnn])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("k", [1, 3])
def test_products_are_those_of_the_dense_matrices(options, make, dtype, k):
    offered(options)
    p = moved(moved(make(), dtype, "cpu"), torch.float64, "cpu")
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for build, exact in (
        (hessian, dense_hessian(p.full_loss, p.parameters)),
        (ggn, dense_ggn(p.loss_of_outputs, p.outputs, p.parameters)),
    ):
        A = build(moved(p, dtype), **options)
        for seed in range(3):  # traced or captured at the first one
            V = A.space.random(k, seed=seed)
            assert relative(A @ V, exact @ V.double().cpu()) <= tolerance


@ways
def test_results_are_memory_of_their_own(options):
    offered(options)
    A = ggn(moved(gallery.mlp()), **options)
    V, W = A.space.random(2, seed=0), A.space.random(2, seed=1)
    A @ V
    first = A @ V
    kept = first.clone()
    second = A @ W
    assert torch.equal(first, kept)
    assert first.data_ptr() != second.data_ptr()
    first.fill_(torch.nan)
    assert torch.equal(A @ V, kept)


@ways
def test_the_matrix_stays_that_of_the_weights_it_was_built_with(options):
    offered(options)
    p = moved(gallery.mlp())
    A = ggn(p, **options)
    V = A.space.random(2)
    before = A @ V
    with torch.no_grad():
        for parameter in p.model.parameters():
            parameter.mul_(2)
    assert torch.equal(A @ V, before)


@ways
def test_another_width_is_traced_anew(options):
    offered(options)
    p = gallery.mlp()
    exact, A = dense_hessian(p.full_loss, p.parameters), hessian(moved(p), **options)
    for k in (1, 4, 2, 1, 4):
        V = A.space.random(k, seed=k)
        assert relative(A @ V, exact @ V.cpu()) <= 1e-10


@ways
def test_solvers_find_the_eigenvalues_of_the_dense_hessian(options):
    offered(options)
    p = gallery.mlp()
    exact = torch.linalg.eigvalsh(dense_hessian(p.full_loss, p.parameters)).flip(0)[:3]
    found = lanczos(hessian(moved(p), **options), 3, which="LA", tol=1e-8).eigenvalues
    torch.testing.assert_close(found.cpu().double(), exact, rtol=1e-8, atol=0)


@only_cuda
def test_a_thousand_captured_products_leave_memory_as_it_was():
    offered({"cuda_graphs": True})
    A = ggn(moved(gallery.mlp()), cuda_graphs=True)
    V = A.space.random(2)
    A @ V
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(DEVICE)
    for _ in range(1000):
        A @ V
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated(DEVICE) == before
