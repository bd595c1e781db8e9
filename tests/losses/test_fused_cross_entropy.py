"""H u = w (p u − p ⟨p, u⟩) by every backend, on every shape, dtype and memory layout.

Triton's interpreter must be chosen before Triton is imported: this file, run as a script, prints
the errors of the kernel in a process of its own.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from torchlinop.errors import OptionError
from torchlinop.losses import fused_cross_entropy
from torchlinop.losses.fused_cross_entropy import cross_entropy_hvp, cross_entropy_map

# In half precision it is the result that is rounded, by Triton's interpreter towards zero.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: torch.finfo(torch.float16).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
}


def formula(logits, weights, u):
    """The product in float64, whatever it is asked for in."""
    logits, w, u = logits.double(), weights.double().unsqueeze(-1), u.double()
    masked = w == 0
    p = logits.masked_fill(masked, 0).softmax(-1)
    return w * (p * u - p * (p * u).sum(-1, keepdim=True))


def plain(V, dtype, rows=3, scale=3.0):
    """Logits, weights with one masked row, and u."""
    weights = torch.rand(rows, dtype=torch.float64) + 0.1
    weights[1:2] = 0
    logits, u = scale * torch.randn(rows, V), torch.randn(rows, V)
    return logits.to(dtype), weights.to(dtype), u.to(dtype)


def all_masked():
    logits, weights, u = plain(100, torch.float32)
    return logits, torch.zeros_like(weights), u


def masked_nonsense():
    logits, weights, u = plain(100, torch.float32)
    logits[1, ::2], logits[1, 1::2] = torch.inf, torch.nan
    return logits, weights, u


def forbidden_entries(V):
    """Logits of -inf, which make up the first 4,096 entries or all but the last of a row."""
    logits, weights, u = plain(V, torch.float64)
    logits[0, :4096], logits[2, :-1] = -torch.inf, -torch.inf
    return logits, weights, u


def fifty(dtype):
    """Logits of 50 and -50, and one row that is certain of its class."""
    logits, weights, u = plain(100, dtype)
    logits = torch.where(logits > 0, 50, -50).to(dtype)
    logits[0, 1:] = -50
    return logits, weights, u


def confident(dtype):
    """p = 0.9997, for which half precisions would round 1 - p, and so all products, to nothing."""
    logits, weights, u = plain(4, dtype, rows=5)
    logits[:], u[:] = 0, 0
    logits[:, 2], u[:, 2] = 9.25, 1
    return logits, weights, u


def laid_out(shape, view, leading=()):
    """Logits and u that are the same views of larger buffers."""
    logits, u = view(torch.randn(shape).double()), view(torch.randn(*leading, *shape).double())
    weights = torch.rand(logits.shape[:-1], dtype=torch.float64)
    weights[..., 0] = 0
    return logits, weights, u


def every_other(tensor):
    """Rows on four axes that cannot be merged."""
    return tensor[..., ::2, ::2, ::2, ::2, 1:-1]


def fp32_directions():
    logits, weights, u = plain(7, torch.bfloat16)
    return logits, weights.float(), u.float()


DTYPES = list(TOLERANCES)
CASES = {
    **{f"V={V} {t}": lambda V=V, t=t: plain(V, t) for V in (1, 7, 100) for t in DTYPES},
    **{f"V=50257 {t}": lambda t=t: plain(50257, t, rows=2) for t in DTYPES},
    **{f"V=130000 {t}": lambda t=t: plain(130000, t, rows=2) for t in DTYPES},
    **{f"logits of 50 {t}": lambda t=t: fifty(t) for t in DTYPES},
    **{f"confident {t}": lambda t=t: confident(t) for t in DTYPES[2:]},
    "one token": lambda: plain(7, torch.float64, rows=1),
    "no token": lambda: plain(7, torch.float64, rows=0),
    "many tokens": lambda: plain(7, torch.float64, rows=500),
    "all masked": all_masked,
    "masked nonsense": masked_nonsense,
    "forbidden entries": lambda: forbidden_entries(9000),
    "bf16 logits and fp32 directions": fp32_directions,
    "next tokens": lambda: laid_out((2, 4, 9), lambda t: t[..., :-1, :]),
    "columns of a buffer": lambda: laid_out((4, 20), lambda t: t[..., 3:-4]),
    "every other column": lambda: laid_out((4, 20), lambda t: t[..., ::2]),
    "transposed": lambda: laid_out((100, 5), lambda t: t.mT),
    "classes second": lambda: laid_out((2, 7, 3, 4), lambda t: t.movedim(-3, -1)),
    "rows on four axes": lambda: laid_out((2, 3, 2, 3, 7), every_other, leading=(2,)),
    "a block": lambda: laid_out((4, 9), lambda t: t, leading=(5,)),
    "a block of blocks": lambda: laid_out((2, 4, 9), lambda t: t[..., :-1, :], leading=(2, 3)),
    "a block, transposed": lambda: laid_out((7, 4), lambda t: t.mT, leading=(3,)),
    "shared weights": lambda: (torch.randn(4, 9), torch.tensor(0.25).expand(4), torch.randn(4, 9)),
}


def made(case):
    torch.manual_seed(0)
    return CASES[case]()


def error(HU, logits, weights, u):
    """Largest error relative to the largest entry; NaN counts."""
    expected = formula(logits, weights, u)
    if not expected.any():
        return float(HU.abs().sum())
    return float((HU - expected).abs().max() / expected.abs().max())


def errors(case, backend):
    """Of the product as new memory, and in place."""
    logits, weights, u = made(case)
    HU = cross_entropy_hvp(logits, weights, u, backend)
    in_place = cross_entropy_map(logits, weights, backend)(u.clone())
    return [error(HU, logits, weights, u), error(in_place, logits, weights, u)]


@pytest.fixture(scope="module")
def interpreted():
    """Errors of the Triton kernel in every case, from a process with its interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton, which comes with torch's wheels for Linux")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    # Older interpreters use what NumPy has deprecated.
    allowed = ["-W", "default::DeprecationWarning", "-W", "default::ResourceWarning"]
    command = [sys.executable, "-W", "error", *allowed, __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("case", CASES)
def test_eager_product_is_the_formula(case):
    _, _, u = made(case)
    assert max(errors(case, "eager")) <= TOLERANCES[u.dtype]


@pytest.mark.parametrize("case", CASES)
def test_triton_product_is_the_formula(case, interpreted):
    _, _, u = made(case)
    assert max(interpreted[case]) <= TOLERANCES[u.dtype]


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_product_is_the_hessian_of_weighted_cross_entropy(backend):
    logits, weights, _ = plain(5, torch.float64)
    targets = torch.tensor([4, 0, 2])

    def loss(logits):
        return weights @ torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    H = torch.autograd.functional.hessian(loss, logits).reshape(15, 15)
    columns = cross_entropy_hvp(logits, weights, torch.eye(15).double().view(15, 3, 5), backend)
    torch.testing.assert_close(columns.view(15, 15), H, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("case", ["masked nonsense", "all masked", "V=100 torch.bfloat16"])
def test_products_of_masked_rows_are_exactly_zero(case):
    logits, weights, u = made(case)
    HU = cross_entropy_hvp(logits, weights, u, "eager")
    assert not HU[weights == 0].any()


def test_product_as_new_memory_leaves_its_arguments_alone():
    arguments = plain(7, torch.float64)
    before = [t.clone() for t in arguments]
    cross_entropy_hvp(*arguments, "eager")
    assert all(map(torch.equal, arguments, before))


def test_map_overwrites_and_returns_its_vector_and_may_be_used_again():
    logits, weights, u = plain(7, torch.float64)
    H = cross_entropy_map(logits, weights, "eager")
    first, second = u.clone(), u.clone()
    assert H(first) is first
    assert torch.equal(H(second), first)


def test_products_carry_no_graph():
    logits, weights, u = plain(7, torch.float64)
    HU = cross_entropy_hvp(logits.requires_grad_(), weights, u.requires_grad_(), "eager")
    assert not HU.requires_grad


def allocations(function):
    """Bytes that single operations allocated, the largest first."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = function()
    del kept
    return sorted((e.self_cpu_memory_usage for e in profiled.events()), reverse=True)


@pytest.mark.parametrize("view", [torch.Tensor.clone, lambda t: t.T.clone().T, lambda t: t[:, ::2]])
def test_eager_product_allocates_two_buffers_of_the_size_of_the_logits(view):
    logits, u = view(torch.randn(600, 16000)), view(torch.randn(600, 16000))
    found = allocations(lambda: cross_entropy_hvp(logits, torch.ones(600), u, "eager"))
    assert found[:2] == [4 * logits.numel()] * 2
    assert found[2] <= 4 * logits.numel() / 8  # a piece of the rows


def test_products_of_the_eager_map_allocate_no_buffer_of_the_size_of_the_logits():
    logits, u = torch.randn(600, 16000), torch.randn(2, 600, 16000)
    H = cross_entropy_map(logits, torch.ones(600), "eager")
    assert allocations(lambda: H(u))[0] <= 4 * logits.numel() / 8


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("stance", ["force_eager", "default"])
def test_product_is_compiled_while_models_are_evaluated(stance, monkeypatch):
    logits, weights, u = plain(7, torch.float64)
    monkeypatch.setattr(fused_cross_entropy, "_eager", None)
    with torch.compiler.set_stance(stance):
        HU = cross_entropy_hvp(logits, weights, u, "compile")
        in_place = cross_entropy_map(logits, weights, "compile")(u.clone())
    assert error(HU, logits, weights, u) <= 1e-12
    assert error(in_place, logits, weights, u) <= 1e-12


def test_compiled_product_beyond_the_limit_of_recompilations_is_the_formula(monkeypatch):
    monkeypatch.setattr(fused_cross_entropy, "_compiled_formula", lambda: never_compiled)
    arguments = plain(7, torch.float64)
    assert error(cross_entropy_hvp(*arguments, "compile"), *arguments) <= 1e-12


@torch.compiler.disable
def never_compiled(*arguments):
    return fused_cross_entropy._formula(*arguments)


WITHOUT_COMPILER = """
import logging, torch
from torchlinop.losses.fused_cross_entropy import cross_entropy_hvp
logging.getLogger("torchlinop").addHandler(logging.StreamHandler())
logits, weights, u = torch.randn(3, 7), torch.ones(3), torch.randn(3, 7)
for _ in range(2):
    HU = cross_entropy_hvp(logits, weights, u, "compile")
assert torch.equal(HU, cross_entropy_hvp(logits, weights, u, "eager"))
twice = torch.compile(lambda t: 2 * t, backend="eager", fullgraph=True)
assert torch.equal(twice(u), 2 * u)
"""


def test_without_a_compiler_the_log_says_so_once_and_products_are_eager(tmp_path):
    environment = os.environ | {
        "CXX": "no-such-compiler",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    command = [sys.executable, "-c", WITHOUT_COMPILER]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("cross-entropy by compile failed, using eager products") == 1


def test_a_mistake_of_the_caller_is_not_taken_for_a_failing_compiler(monkeypatch):
    monkeypatch.setattr(fused_cross_entropy, "_failed", set())
    logits, weights, u = plain(7, torch.float64)
    with pytest.raises(RuntimeError, match="size"):
        cross_entropy_hvp(logits, weights, u[:, :5], "compile")
    assert not fused_cross_entropy._failed


def test_auto_compiles_nothing_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    monkeypatch.setitem(sys.modules, "triton", None)
    arguments = plain(7, torch.float64)
    assert error(cross_entropy_hvp(*arguments), *arguments) <= 1e-12


def test_unknown_backend_is_refused_with_the_choices():
    with pytest.raises(OptionError, match=r"'cuda' of cross-entropy; .* auto, eager, compile, tri"):
        cross_entropy_map(*plain(7, torch.float64)[:2], "cuda")


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter works on a CPU")
def test_triton_is_refused_on_a_cpu():
    pytest.importorskip("triton")
    with pytest.raises(OptionError, match=r'expected logits on a GPU, .* pass backend="auto", or'):
        cross_entropy_map(*plain(7, torch.float64)[:2], "triton")


def test_triton_is_refused_where_it_is_not_installed(monkeypatch):
    name = "torchlinop.losses.triton_cross_entropy"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("torchlinop.losses.triton_cross_entropy", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(OptionError, match=r"needs the package triton .* install it, or pass"):
        cross_entropy_map(*plain(7, torch.float64)[:2], "triton")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({case: errors(case, "triton") for case in CASES}))
