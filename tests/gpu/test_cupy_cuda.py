"""The CuPy adapter on a CUDA device: no byte copied, no race, and what solvers of cupyx find."""

import os
import re
import shutil
import subprocess
import sys
import types
import warnings
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import linalg as scipy_linalg

from torchlinop import (
    GGNOperator,
    LambdaOperator,
    MatrixOperator,
    as_linear_operator,
    from_linear_operator,
)
from torchlinop.adapters import cupy_memory
from torchlinop.adapters.cupy import as_cupy_operator
from torchlinop.adapters.cupy_solvers import cupy_eigsh, cupy_lobpcg
from torchlinop.bench.variants import keywords
from torchlinop.errors import TorchlinopWarning, VectorError
from torchlinop.testing import gallery

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
with warnings.catch_warnings():
    # What these do when they are first imported is not ours to fail on.
    warnings.simplefilter("ignore")
    cupy = pytest.importorskip("cupy")
    sparse = pytest.importorskip("cupyx.scipy.sparse")
    linalg = pytest.importorskip("cupyx.scipy.sparse.linalg")

N = 200
SPD = torch.linspace(1, 9, N, dtype=torch.float64)
DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
ROOT = Path(__file__).parents[2]


def matrix(values, dtype=torch.float64):
    Q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.complex128))[0]
    Q = Q if dtype.is_complex else torch.linalg.qr(Q.real)[0]
    return ((Q * values) @ Q.mH).to("cuda", dtype)


def tolerance(dtype):
    return 1e-4 if torch.finfo(dtype).eps > 1e-10 else 1e-9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [None, 3])
def test_both_libraries_see_one_memory(monkeypatch, dtype, k):
    op, seen = MatrixOperator(matrix(SPD, dtype)), []
    monkeypatch.setattr(op, "_matmat", lambda V: seen.extend([V, op.matrix @ V]) or seen[1])
    A = as_cupy_operator(op)
    x = cupy.random.random((N,) if k is None else (N, k)).astype(A.dtype)
    y = A @ x
    assert (seen[0].data_ptr(), seen[1].data_ptr()) == (x.data.ptr, y.data.ptr)
    np.testing.assert_allclose(y.get(), op.matrix.cpu().numpy() @ x.get(), rtol=1e-4, atol=1e-4)


def test_product_of_cupy_vectors_makes_no_memcpy():
    A = as_cupy_operator(MatrixOperator(matrix(SPD)))
    x = cupy.ones(N)
    A @ x
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    # acc_events: else torch from 2.10 to 2.12 warns, although there is but one cycle.
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        A @ x
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert any("gem" in name.lower() for name in names)  # else nothing was traced
    assert [name for name in names if "memcpy" in name.lower()] == []


def slow(n, cycles, dtype=torch.float64):
    """2 v, after so many cycles."""

    def product(v):
        torch.cuda._sleep(cycles)
        return 2 * v

    return LambdaOperator(n, product, dtype=dtype, device="cuda")


def on(of_torch, of_cupy):
    """Streams of their own, which do not wait for the default stream by themselves."""
    stack = ExitStack()
    if of_torch == "side":
        stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
    if of_cupy == "side":
        stack.enter_context(cupy.cuda.Stream(non_blocking=True))
    return stack


@pytest.mark.parametrize(
    ("of_torch", "of_cupy"),
    [("default", "side"), ("side", "default"), ("side", "side"), ("default", "default")],
)
def test_products_wait_for_vectors_and_vectors_for_products(of_torch, of_cupy):
    n = 1 << 18
    with on(of_torch, of_cupy):
        A, x = as_cupy_operator(slow(n, 50_000)), cupy.zeros(n)
        worst = cupy.zeros(())
        for i in range(1000):
            x.fill(i)
            y = A @ x
            x.fill(-1)  # as a solver overwrites its workspace
            cupy.maximum(worst, abs(y - 2 * i).max(), out=worst)
        assert float(worst) == 0


def of_cupy_without_waiting(y):
    """The memory of a vector, and nobody's stream waits."""
    memory = cupy.cuda.UnownedMemory(y.data_ptr(), y.nbytes, y)
    return cupy.ndarray(tuple(y.shape), "float64", cupy.cuda.MemoryPointer(memory, 0))


def read_at_once(n=1 << 18):
    """Whether CuPy sees, on its own stream, a product that torch is still busy with on another."""
    stale = torch.full((64, n), -1.0, dtype=torch.float64, device="cuda")
    torch.cuda.synchronize()
    del stale  # what the product will be written to holds -1
    with on("side", "side"):
        x = cupy.ones(n)
        cupy.cuda.get_current_stream().synchronize()
        y = as_cupy_operator(slow(n, 200_000_000)) @ x
        seen = y + 0
        cupy.cuda.get_current_stream().synchronize()
        right = bool((seen == 2).all())
        torch.cuda.synchronize()
    return right


def test_cupy_reads_a_product_when_it_is_there():
    assert read_at_once()


def test_without_waiting_it_reads_too_early(monkeypatch):
    # Else the test above would prove nothing.
    careless = types.SimpleNamespace(
        cuda=cupy.cuda, ndarray=cupy.ndarray, from_dlpack=of_cupy_without_waiting
    )
    monkeypatch.setattr(cupy_memory, "cupy", lambda *_: careless)
    assert not read_at_once()


def read_late(n=1 << 20):
    """What CuPy reads of a product on a busy stream, after torch could have reused its memory."""
    with cupy.cuda.Stream(non_blocking=True) as stream:
        y = as_cupy_operator(slow(n, 1000)) @ cupy.ones(n)
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
            torch.cuda._sleep(200_000_000)
        late = y + 0
        del y
        others = [torch.full((n,), -1.0, dtype=torch.float64, device="cuda") for _ in range(8)]
        stream.synchronize()
        return float(abs(late - 2).max()), others


def test_memory_of_a_product_is_not_reused_while_cupy_reads_it():
    assert read_late()[0] == 0


def test_without_the_protection_it_is_reused(monkeypatch):
    # Else the test above would prove nothing.
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda y, stream: None)
    assert read_late()[0] > 0


def test_per_thread_default_stream_is_refused():
    code = (
        "import cupy, torch; from torchlinop import MatrixOperator; "
        "from torchlinop.adapters.cupy import as_cupy_operator; "
        "as_cupy_operator(MatrixOperator(torch.eye(3).cuda())) @ cupy.ones(3, 'float32')"
    )
    environment = os.environ | {"CUPY_CUDA_PER_THREAD_DEFAULT_STREAM": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert "VectorError: expected CuPy on the legacy default stream" in ran.stderr


SYSTEMS = {
    "cg": (["rtol"], DTYPES),
    "cgs": (["rtol"], DTYPES[:2]),
    "bicgstab": (["rtol"], DTYPES),
    "gmres": (["rtol"], DTYPES),
    "minres": (["tol"], DTYPES[:2]),
    "lsmr": (["atol", "btol"], DTYPES[:2]),
}
CASES = [(name, dtype) for name, (_, dtypes) in SYSTEMS.items() for dtype in dtypes]


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("factor", [None, 2.0])
def test_systems_are_solved_by_cupyx(name, dtype, factor):
    M = matrix(SPD, dtype)
    A = as_cupy_operator(MatrixOperator(M))
    A = A if factor is None else factor * A
    b = cupy.ones(N, A.dtype)
    options = dict.fromkeys(SYSTEMS[name][0], tolerance(dtype) / 100)
    x = getattr(linalg, name)(A, b, **options)[0]
    M = M.cpu().to(torch.promote_types(dtype, torch.float64)).numpy() * (factor or 1)
    exact = np.linalg.solve(M, b.get())
    # lsmr works on A^T A, whose condition is the square.
    assert np.linalg.norm(x.get() - exact) <= 10 * tolerance(dtype) * np.linalg.norm(exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_eigsh_of_cupyx_finds_the_end_of_the_spectrum(dtype, which):
    w = linalg.eigsh(
        as_cupy_operator(MatrixOperator(matrix(SPD, dtype))), k=4, which=which,
        tol=tolerance(dtype), return_eigenvectors=False,
    )  # fmt: skip
    expected = SPD[:4] if which == "SA" else SPD[-4:]
    np.testing.assert_allclose(w.get(), expected, rtol=10 * tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_svds_and_lobpcg_of_cupyx(dtype):
    A = as_cupy_operator(MatrixOperator(matrix(SPD, dtype)))
    s = linalg.svds(A, k=3, return_singular_vectors=False)
    np.testing.assert_allclose(np.sort(s.get()), SPD[-3:], rtol=10 * tolerance(dtype))
    w, _ = linalg.lobpcg(A, cupy.random.random((N, 4)).astype(A.dtype), tol=1e-2, maxiter=100)
    np.testing.assert_allclose(w.get()[:2], SPD.flip(0)[:2], rtol=1e-3)


@pytest.mark.parametrize("rank", [0, 1, 2, 10])
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("call", [cupy_eigsh, cupy_lobpcg])
@pytest.mark.filterwarnings("ignore::torchlinop.TorchlinopWarning")
def test_low_rank_gives_numbers(rank, dtype, call):
    values = torch.cat([torch.zeros(100 - rank), torch.arange(1.0, rank + 1)]).double()
    result = call(MatrixOperator(matrix(values, dtype)), 4, which="LA")
    np.testing.assert_allclose(
        result.eigenvalues.cpu(), values.flip(0)[:4], rtol=0, atol=1e-3 * max(rank, 1)
    )


@pytest.mark.xfail(reason="eigsh of CuPy 14.2 divides by zero where a Krylov space ends early")
@pytest.mark.parametrize("rank", [0, 1, 2, 10])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_eigsh_of_cupyx_by_itself_survives_low_rank(rank, dtype):
    values = torch.cat([torch.zeros(100 - rank), torch.arange(1.0, rank + 1)]).double()
    A = as_cupy_operator(MatrixOperator(matrix(values, dtype)))
    w = linalg.eigsh(A, k=4, which="LA", tol=1e-3, maxiter=500, return_eigenvectors=False)
    expected = values.flip(0)[:4].flip(0)
    np.testing.assert_allclose(np.sort(w.get()), expected, rtol=0, atol=1e-2 * max(rank, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_relative_accuracy_is_reached_at_every_scale(dtype, scale):
    M = matrix(scale * SPD, dtype)
    result = cupy_eigsh(MatrixOperator(M), 4, tol=1e-3)
    residuals = (M @ result.eigenvectors - result.eigenvectors * result.eigenvalues).norm(dim=0)
    assert result.method == "eigsh of cupyx"
    assert bool((residuals <= 2e-3 * result.eigenvalues).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_speaks_float32(dtype):
    A = as_cupy_operator(MatrixOperator(torch.diag(torch.arange(64.0)).to("cuda", dtype)))
    y = A @ cupy.ones(64, "float32")
    assert y.dtype == A.dtype == np.float32
    np.testing.assert_array_equal(y.get(), np.arange(64))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_another_current_device_does_not_matter_but_another_arrays_does():
    A = as_cupy_operator(MatrixOperator(torch.eye(3, device="cuda:1")))
    with cupy.cuda.Device(1):
        x = cupy.ones(3, "float32")
    assert (A @ x).device.id == 1
    with pytest.raises(VectorError, match=r"expected a cupy.ndarray on cuda:1, got one on cuda:0"):
        A @ cupy.ones(3, "float32")


def test_a_thousand_products_leave_memory_as_it_was():
    A, x = as_cupy_operator(MatrixOperator(matrix(SPD))), cupy.ones(N)
    A @ x
    before = torch.cuda.memory_allocated(), cupy.get_default_memory_pool().used_bytes()
    for _ in range(1000):
        A @ x
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), cupy.get_default_memory_pool().used_bytes()) == before


def test_memory_of_torch_serves_cupy_by_the_recipe():
    allocator = cupy.cuda.PythonFunctionAllocator(
        lambda size, device: torch.cuda.caching_allocator_alloc(
            size, device, cupy.cuda.get_current_stream().ptr
        ),
        lambda pointer, device: torch.cuda.caching_allocator_delete(pointer),
    )
    with cupy.cuda.using_allocator(allocator.malloc):
        before = torch.cuda.memory_allocated()
        x = cupy.ones(1 << 20)
        assert torch.cuda.memory_allocated() > before
        A = as_cupy_operator(LambdaOperator(1 << 20, lambda v: 3 * v, dtype=torch.float64,
                                            device="cuda"))  # fmt: skip
        assert float((A @ x).max()) == 3


def test_one_pool_of_rmm_serves_both():
    pytest.importorskip("rmm")
    code = (
        "import rmm, torch, cupy; from rmm.allocators.cupy import rmm_cupy_allocator; "
        "from rmm.allocators.torch import rmm_torch_allocator; "
        "rmm.reinitialize(pool_allocator=True, initial_pool_size=2**28); "
        "torch.cuda.memory.change_current_allocator(rmm_torch_allocator); "
        "cupy.cuda.set_allocator(rmm_cupy_allocator); "
        "from torchlinop import MatrixOperator, as_cupy_operator; "
        "A = as_cupy_operator(MatrixOperator(3 * torch.eye(99, device='cuda'))); "
        "assert float((A @ cupy.ones(99, 'float32')).max()) == 3"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_managed_memory_is_refused_by_name():
    A = as_cupy_operator(MatrixOperator(matrix(SPD)))
    with (
        cupy.cuda.using_allocator(cupy.cuda.malloc_managed),
        pytest.raises(VectorError, match=r"managed|torch can share"),
    ):
        A @ cupy.ones(N)


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(lambda: np.ones(N), id="host"),
        pytest.param(lambda: torch.ones(N), id="cpu-tensor"),
        pytest.param(lambda: torch.ones(N, device="cuda", requires_grad=True), id="grad"),
    ],
)
def test_what_is_no_array_of_cupy_is_refused(x):
    A = as_cupy_operator(MatrixOperator(matrix(SPD)))
    with pytest.raises(VectorError, match=r"expected a cupy.ndarray on cuda:0, got a"):
        A @ x()


def test_output_of_a_cuda_graph_is_cloned():
    graph, v = torch.cuda.CUDAGraph(), torch.zeros(N, dtype=torch.float64, device="cuda")
    2 * v
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = 2 * v

    def replayed(x):
        v.copy_(x)
        graph.replay()
        return y

    A = as_cupy_operator(LambdaOperator(N, replayed, dtype=torch.float64, device="cuda"))
    first, second = A @ cupy.ones(N), A @ cupy.full(N, 5.0)
    assert (float(first.max()), float(second.min())) == (2, 10)


@pytest.mark.parametrize("option", ["compile", "cuda_graphs"])
@pytest.mark.filterwarnings("ignore", "error:torch.compile failed")  # of compilers
def test_products_that_are_compiled_or_captured_are_handed_over_as_new_memory(option):
    if option not in keywords(GGNOperator):
        pytest.skip(f"GGNOperator has no keyword {option}")
    p = gallery.mlp()
    model = p.model.cuda()
    op = GGNOperator(
        model, p.batches, p.forward_fn, p.criterion, linearization="keep", **{option: True}
    )
    plain = GGNOperator(model, p.batches, p.forward_fn, p.criterion)
    A, B = as_cupy_operator(op), as_cupy_operator(plain)
    first, second = A @ cupy.ones(op.size), A @ cupy.full(op.size, 5.0)
    expected = (B @ cupy.ones(op.size)).get()
    np.testing.assert_allclose(first.get(), expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(second.get(), 5 * expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "convert",
    [
        lambda M: M,
        lambda M: cupy.asfortranarray(M)[::-1, ::-1][::-1, ::-1],
        sparse.csr_matrix,
        linalg.aslinearoperator,
        lambda M: linalg.aslinearoperator(M / 2) * 2.0,
    ],
    ids=["ndarray", "reversed", "csr_matrix", "LinearOperator", "expression"],
)
@pytest.mark.parametrize("of_cupy", ["default", "side"])
def test_matrix_of_cupy_is_an_operator_of_ours(convert, of_cupy):
    with on("default", of_cupy):
        M = matrix(SPD)
        torch.cuda.synchronize()
        op = from_linear_operator(convert(cupy.from_dlpack(M)))
        V = op.space.random(3)
        torch.testing.assert_close(op @ V, M @ V)


SCIPY = {
    "eigsh": lambda A: scipy_linalg.eigsh(A, 3, return_eigenvectors=False)[::-1],
    "lobpcg": lambda A: scipy_linalg.lobpcg(
        A, np.random.default_rng(0).random((N, 6)), tol=1e-6, maxiter=500
    )[0][:3],
    "svds": lambda A: np.sort(scipy_linalg.svds(A, 3, return_singular_vectors=False))[::-1],
}


@pytest.mark.parametrize("name", SCIPY)
@pytest.mark.filterwarnings("ignore:Exited")
def test_scipy_over_page_locked_memory_finds_the_same(name):
    A = as_linear_operator(MatrixOperator(matrix(SPD)))
    np.testing.assert_allclose(SCIPY[name](A), SPD.flip(0)[:3], rtol=1e-5)


@pytest.mark.parametrize("name", ["cg", "gmres", "minres", "bicgstab"])
def test_systems_of_scipy_over_page_locked_memory(name):
    M = matrix(SPD)
    x, _ = getattr(scipy_linalg, name)(
        as_linear_operator(MatrixOperator(M)), np.ones(N), rtol=1e-10
    )
    np.testing.assert_allclose(M.cpu().numpy() @ x, 1, rtol=1e-7)


def test_results_for_scipy_are_memory_of_their_own():
    A = as_linear_operator(LambdaOperator(N, lambda v: 2 * v, dtype=torch.float64, device="cuda"))
    results = [A @ np.full(N, float(i)) for i in range(50)]
    for i, y in enumerate(results):
        assert bool((y == 2 * i).all())


def test_how_to_runs():
    page = (ROOT / "docs" / "cupy.md").read_text()
    namespace = {}
    try:
        for block in re.findall(r"^```py\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
            exec(compile(block, "docs/cupy.md", "exec"), namespace)
    finally:  # the page sets an allocator for the whole process
        cupy.cuda.set_allocator(cupy.get_default_memory_pool().malloc)


def test_example_runs():
    subprocess.run([sys.executable, ROOT / "examples" / "10_cupy_eigsh.py"], check=True)


@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    code = (
        "import cupy, torch; from torchlinop import MatrixOperator; "
        "from torchlinop.adapters.cupy import as_cupy_operator; "
        "A = as_cupy_operator(MatrixOperator(torch.eye(99).cuda())); x = cupy.ones(99, 'float32');"
        "[A @ x for _ in range(3)]; print('multiplied')"
    )
    options = ["--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
    command = ["compute-sanitizer", *options, sys.executable, "-c", code]
    try:
        ran = subprocess.run(command, check=False, timeout=60, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{tool} takes more than a minute here")
    if "multiplied" not in ran.stdout:
        pytest.skip(f"{tool} does not run here: {ran.stdout[-200:]}")
    assert ran.returncode == 0, ran.stdout


@pytest.mark.skipif("CUPY_SOURCE" not in os.environ, reason="needs CUPY_SOURCE, CuPy's checkout")
def test_solver_tests_of_cupy_pass_through_the_adapter():
    file = "tests/cupyx_tests/scipy_tests/sparse_tests/test_linalg.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "cupy_through_the_adapter", file]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    ran = subprocess.run(
        [*command, "-k", "Cg or Gmres or Minres or Lsmr or Eigsh"],
        cwd=os.environ["CUPY_SOURCE"], env=environment, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-4000:]


def test_fall_back_says_so(monkeypatch):
    # CuPy after 14.2 stops early on low rank, so the NaN is made here.
    monkeypatch.setattr(linalg, "eigsh", lambda *a, **o: (None, cupy.full((N, 4), cupy.nan)))
    with pytest.warns(TorchlinopWarning, match="eigsh of cupyx gave NaN, .* are those of lanczos"):
        result = cupy_eigsh(MatrixOperator(matrix(SPD)), 4)
    np.testing.assert_allclose(result.eigenvalues.cpu(), SPD.flip(0)[:4], rtol=1e-6)
