"""The Triton kernel of the cross-entropy Hessian on the device, against the formula.

On a CPU by Triton's interpreter, with TRITON_INTERPRET=1.
"""

import os

import pytest
import torch
from on_device import DEVICE, anywhere, only_cuda

from torchlinop.losses import fused_cross_entropy
from torchlinop.losses.fused_cross_entropy import cross_entropy_hvp, cross_entropy_map

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    *anywhere,
    pytest.mark.skipif(
        DEVICE.type == "cpu" and not INTERPRETED, reason="needs a GPU, or TRITON_INTERPRET=1"
    ),
]

TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: torch.finfo(torch.float16).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
}

LAYOUTS = {
    "contiguous": lambda shape: torch.randn(shape),
    "next tokens": lambda shape: torch.randn(shape[0], shape[1] + 1, shape[2])[:, :-1],
    "every other class": lambda shape: torch.randn(*shape[:2], 2 * shape[2])[..., ::2],
    "classes second": lambda shape: torch.randn(shape[0], shape[2], shape[1]).mT,
}


def made(shape, dtype=torch.float32, layout="contiguous", block=()):
    """Logits, weights with masked rows, and u, on the device."""
    weights = torch.rand(shape[:-1]) + 0.1
    weights[:, ::3] = 0
    u = torch.randn(*block, *shape)
    return [t.to(DEVICE, dtype) for t in (3 * LAYOUTS[layout](shape), weights, u)]


def error(HU, logits, weights, u):
    """Largest error relative to the largest entry of the formula in float64."""
    p, w, u = logits.double().softmax(-1), weights.double().unsqueeze(-1), u.double()
    expected = w * (p * u - p * (p * u).sum(-1, keepdim=True))
    return float((HU - expected).abs().max() / expected.abs().max())


LARGE = [pytest.param(V, marks=only_cuda) for V in (50257, 130000)]


@pytest.mark.parametrize("V", [7, 100, 5000, *LARGE])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_product_is_the_formula(V, dtype):
    arguments = made((3, 5, V), dtype)
    assert error(cross_entropy_hvp(*arguments, "triton"), *arguments) <= TOLERANCES[dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", [(), (4,), (2, 3)])
def test_product_of_every_layout_is_the_formula_in_place_too(layout, block):
    logits, weights, u = made((3, 5, 5000), torch.float64, layout, block)
    HU = cross_entropy_map(logits, weights, "triton")(u.clone())
    assert error(HU, logits, weights, u) <= 1e-12
    assert not HU[..., weights == 0, :].any()


@only_cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_auto_is_triton_and_waits_for_nothing_and_allocates_the_result_alone():
    logits, weights, u = made((4, 64, 50257))
    cross_entropy_hvp(logits, weights, u)  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cross_entropy_hvp(logits, weights, u)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert "triton" not in fused_cross_entropy._failed
    assert torch.cuda.max_memory_allocated() - before <= u.nbytes + 2**20


@only_cuda
def test_product_is_captured_by_a_cuda_graph():
    logits, weights, u = made((2, 8, 5000))
    expected = cross_entropy_hvp(logits, weights, u, "triton")
    graph, V = torch.cuda.CUDAGraph(), torch.zeros_like(u)
    with torch.cuda.graph(graph):
        HU = cross_entropy_hvp(logits, weights, V, "triton")
    V.copy_(u)
    graph.replay()
    assert torch.equal(HU, expected)


@only_cuda
def test_entries_beyond_32_bits_are_addressed():
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free device memory")
    logits = torch.zeros(17000, 130000, dtype=torch.bfloat16, device="cuda")
    logits[-1].normal_()
    u, weights = torch.ones_like(logits), torch.ones(17000, device="cuda")
    u[-1].normal_()
    HU = cross_entropy_map(logits, weights, "triton")(u.clone())
    last = (logits[-1:], weights[-1:], u[-1:])
    assert error(HU[-1:], *last) <= TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize("backend", ["eager", pytest.param("compile", marks=only_cuda)])
def test_other_backends_give_the_formula_too(backend):
    arguments = made((3, 5, 5000), torch.float64)
    assert error(cross_entropy_hvp(*arguments, backend), *arguments) <= 1e-12


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("V", [7, 5000])
def test_kernel_and_eager_formula_agree_in_one_rounding(dtype, V):
    arguments = made((3, 5, V), dtype)
    kernel, eager = (cross_entropy_hvp(*arguments, backend) for backend in ("triton", "eager"))
    largest = float(eager.abs().max())
    assert float((kernel.double() - eager.double()).abs().max()) <= 2 * TOLERANCES[dtype] * largest
