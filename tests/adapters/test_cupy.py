"""The CuPy adapter without a GPU: shapes, dtypes, memory, streams, algebra, and what is refused."""

import copy
import ctypes
import pickle
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from cupyx_on_numpy import Array, found, installed, on_streams

from torchlinop import LambdaOperator, MatrixOperator, as_linear_operator, from_linear_operator
from torchlinop.adapters import cupy as adapter
from torchlinop.adapters.cupy import as_cupy_operator, cupy_operator
from torchlinop.errors import OptionError, ProductBudgetError, VectorError
from torchlinop.operators.rectangular import RectangularOperator
from torchlinop.space import VectorSpace

N = 5
CPU = torch.device("cpu")


@pytest.fixture
def cupyx():
    """``cupyx.scipy.sparse.linalg`` over NumPy, on a device that is none."""
    if found() is None:
        pytest.skip("CuPy is not installed")
    with installed() as linalg, on_streams():
        yield linalg


def integer_matrix(dtype=torch.float64, n=N):
    """A symmetric (Hermitian) matrix of small integers: products with integers are exact."""
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    A = ((i * j + i + j) % 5 - 2).double()
    return (A + 1j * torch.sign(i - j) if dtype.is_complex else A).to(dtype)


def integers(*shape, dtype=np.float64):
    x = (np.arange(np.prod(shape, dtype=int)) * 3 % 7 - 2).reshape(shape)
    return (x * (1 - 1j) if np.dtype(dtype).kind == "c" else x).astype(dtype).view(Array)


class Wide(RectangularOperator):
    """A matrix of more columns than rows."""

    matrix = torch.arange(15, dtype=torch.float64).reshape(3, N)

    def __init__(self):
        super().__init__(*(VectorSpace(n, torch.float64, CPU) for n in self.matrix.shape))

    def _matmat(self, V):
        return self.matrix @ V

    def _rmatmat(self, U):
        return self.matrix.mT @ U


SHAPES = [
    pytest.param(lambda: integers(N), id="vector"),
    pytest.param(lambda: integers(2 * N)[::2], id="strided-vector"),
    pytest.param(lambda: integers(N)[::-1], id="reversed-vector"),
    pytest.param(lambda: integers(N, 1), id="column"),
    pytest.param(lambda: integers(N, 3), id="C-block"),
    pytest.param(lambda: integers(3, N).T, id="F-block"),
    pytest.param(lambda: integers(2 * N, 6)[::2, 1::2], id="strided-block"),
    pytest.param(lambda: integers(N, 0), id="no-columns"),
]


@pytest.mark.parametrize("make", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_product_is_numpys_product_and_contiguous(cupyx, make, dtype):
    A, M, x = cupy_operator(MatrixOperator(integer_matrix(dtype))), integer_matrix(dtype), make()
    for product, matrix in ((A, M), (A.H, M.mH), (A.T, M.mT)):
        y = product @ x
        np.testing.assert_array_equal(y, matrix.resolve_conj().numpy() @ np.asarray(x))
        assert y.shape == x.shape
        assert y.flags.c_contiguous or (y.ndim == 2 and y.flags.f_contiguous)


@pytest.mark.parametrize("given", [np.float32, np.float64, np.complex64, np.complex128, np.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_product_has_the_dtype_that_numpy_promotes_to(cupyx, given, dtype):
    A = cupy_operator(MatrixOperator(integer_matrix(dtype)))
    x = integers(N, 2, dtype=given)
    y = A @ x
    assert y.dtype == np.result_type(A.dtype, given)
    np.testing.assert_array_equal(y, integer_matrix(dtype).to(torch.complex128).numpy() @ x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_declared_float32(cupyx, dtype):
    assert cupy_operator(MatrixOperator(integer_matrix(dtype))).dtype == np.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("k", [None, 1, 3])
def test_no_byte_is_copied_on_the_way(cupyx, monkeypatch, dtype, k):
    op = MatrixOperator(integer_matrix(dtype))
    A, seen = cupy_operator(op), []
    monkeypatch.setattr(op, "_matmat", lambda V: seen.extend([V, op.matrix @ V]) or seen[1])
    x = integers(*((N,) if k is None else (N, k)), dtype=A.dtype)
    y = A @ x
    assert (seen[0].data_ptr(), seen[1].data_ptr()) == (x.ctypes.data, y.ctypes.data)


def test_results_are_memory_of_their_own(cupyx):
    op = LambdaOperator(N, lambda v: v, dtype=torch.float64)  # hands its input through
    A, x = cupy_operator(op), integers(N)
    first, second = A @ x, A @ x
    first[...] = np.nan
    x[...] = 7
    np.testing.assert_array_equal(second, integers(N))


def test_rectangular_operator_has_an_adjoint(cupyx):
    A, x, u = cupy_operator(Wide()), integers(N), integers(3, 2)
    np.testing.assert_array_equal(A @ x, Wide.matrix.numpy() @ x)
    np.testing.assert_array_equal(A.H @ u, Wide.matrix.mT.numpy() @ u)
    np.testing.assert_array_equal(A.rmatmat(u), Wide.matrix.mT.numpy() @ u)
    assert (A.H.matvecs, A.H.shape, A.T.shape) == (5, (N, 3), (N, 3))


ALGEBRA = {
    "2 A": (lambda A: 2 * A, lambda M: 2 * M),
    "A 2.5": (lambda A: A * 2.5, lambda M: 2.5 * M),
    "A / 2": (lambda A: A / 2, lambda M: M / 2),
    "-A": (lambda A: -A, lambda M: -M),
    "A + A": (lambda A: A + A, lambda M: 2 * M),
    "A - 2 A": (lambda A: A - 2 * A, lambda M: -M),
    "A A": (lambda A: A @ A, lambda M: M @ M),
    "A ** 3": (lambda A: A**3, lambda M: M @ M @ M),
    "A.H": (lambda A: A.H, lambda M: M.T),
    "A.T": (lambda A: A.T, lambda M: M.T),
}
DTYPES = [(torch.float32, np.float32), (torch.float64, np.float64)]


@pytest.mark.parametrize(("of_operator", "of_matrix"), ALGEBRA.values(), ids=ALGEBRA)
@pytest.mark.parametrize(("dtype", "declared"), DTYPES)
def test_algebra_of_cupyx_is_that_of_matrices_in_one_dtype(
    cupyx, of_operator, of_matrix, dtype, declared
):
    A = of_operator(cupy_operator(MatrixOperator(integer_matrix(dtype))))
    x = integers(N, 3, dtype=declared)
    y = A @ x
    assert A.dtype == y.dtype == declared
    np.testing.assert_array_equal(y, of_matrix(integer_matrix(dtype).numpy()) @ x)


@pytest.mark.parametrize("of_operator", [pair[0] for pair in ALGEBRA.values()], ids=ALGEBRA)
@pytest.mark.parametrize(("dtype", "declared"), DTYPES)
def test_algebra_of_the_cupyx_installed_needs_no_driver(of_operator, dtype, declared):
    LinearOperator = pytest.importorskip("cupyx.scipy.sparse.linalg").LinearOperator
    A = of_operator(cupy_operator(MatrixOperator(integer_matrix(dtype))))
    assert isinstance(A, LinearOperator)
    assert (A.shape, A.dtype) == ((N, N), declared)


def test_adapter_on_the_cupyx_installed_refuses_host_arrays_and_is_pickled(monkeypatch):
    pytest.importorskip("cupyx")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    A = pickle.loads(pickle.dumps(cupy_operator(MatrixOperator(integer_matrix()))))
    with pytest.raises(VectorError, match=r"expected a cupy.ndarray on cpu, got a numpy.ndarray"):
        A @ np.ones(N)
    assert A.matvecs == 0


def test_symmetric_operator_is_its_own_adjoint_and_transpose(cupyx):
    A = cupy_operator(MatrixOperator(integer_matrix()))
    assert A.H is A
    assert A.T is A


@pytest.mark.parametrize("copied", [copy.copy, lambda A: pickle.loads(pickle.dumps(A))])
def test_copy_has_the_products_and_a_count_of_its_own(cupyx, copied):
    A = cupy_operator(MatrixOperator(integer_matrix()), max_matvecs=7)
    A @ integers(N, 3)
    B = copied(A)
    np.testing.assert_array_equal(B @ integers(N), A @ integers(N))
    assert (A.matvecs, A.matmats, B.matvecs, B.matmats) == (4, 2, 1, 1)


def test_product_beyond_the_budget_is_refused(cupyx):
    A = cupy_operator(MatrixOperator(integer_matrix()), max_matvecs=5)
    A @ integers(N, 3)
    with pytest.raises(ProductBudgetError, match="3 of 5 products are used up, and 3 more"):
        A @ integers(N, 3)


# torch, CuPy -> what is told to whom, in this order.
STREAMS = [
    pytest.param(0, 0, ["x.__dlpack__", "y.__dlpack__"], id="both-on-the-default"),
    pytest.param(0, 1, ["x.__dlpack__", "y.__dlpack__"], id="the-default-by-name"),
    pytest.param(7, 7, ["x.__dlpack__", "y.__dlpack__"], id="one-stream-of-their-own"),
    pytest.param(0, 7, ["x.__dlpack__", ("record", 7), "y.__dlpack__"], id="CuPy-aside"),
    pytest.param(7, 0, ["x.__dlpack__", ("record", 0), "y.__dlpack__"], id="torch-aside"),
    pytest.param(7, 8, ["x.__dlpack__", ("record", 8), "y.__dlpack__"], id="two-streams"),
]


@pytest.mark.parametrize(("of_torch", "of_cupy", "order"), STREAMS)
def test_allocator_is_told_of_another_stream_before_memory_is_handed_over(
    cupyx, of_torch, of_cupy, order
):
    A = cupy_operator(MatrixOperator(integer_matrix()))
    with on_streams(of_torch, of_cupy) as log:
        A @ integers(N)
    assert [e[0] if e[0].endswith("__") else e for e in log] == order


@pytest.mark.parametrize(("of_cupy", "environment"), [(2, "0"), (0, "1")])
def test_per_thread_default_stream_is_refused_before_a_product(
    cupyx, monkeypatch, of_cupy, environment
):
    monkeypatch.setenv("CUPY_CUDA_PER_THREAD_DEFAULT_STREAM", environment)
    A = cupy_operator(MatrixOperator(integer_matrix()))
    with (
        on_streams(0, of_cupy),
        pytest.raises(VectorError, match="got the per-thread default stream; unset CUPY_CUDA"),
    ):
        A @ integers(N)
    assert A.matvecs == 0


class Elsewhere(Array):
    """An array that says it lies somewhere else."""


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ((1, 0), "a cupy.ndarray on cpu, got one in host memory; copy"),
        ((3, 0), "got one in page-locked host memory; copy it with"),
        ((13, 0), "got one in managed CUDA memory; copy it with"),
        ((14, 0), "got one in memory of DLPack device type 14; copy"),
        ((2, 1), r"got one on cuda:1; copy it there: with cupy.cuda.Device\(0\)"),
    ],
)
def test_array_in_other_memory_is_refused(cupyx, monkeypatch, place, message):
    monkeypatch.setattr(Elsewhere, "place", place)
    A = cupy_operator(MatrixOperator(integer_matrix()))
    with pytest.raises(VectorError, match=message):
        A @ integers(N).view(Elsewhere)
    assert A.matvecs == 0


class DLTensor(ctypes.Structure):
    """A tensor of the DLPack header, with its device, dtype and managing context."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class Handmade(Array):
    """An array that claims ordinary memory and exports a capsule of another kind."""

    kind = 13

    def __dlpack__(self, **options):
        shape = (ctypes.c_int64 * 1)(N)
        self.kept = DLTensor(self.ctypes.data, self.kind, 0, 1, 2, 64, 1, shape, None, 0)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = (
            ctypes.py_object,
            [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
        )
        return new(ctypes.addressof(self.kept), b"dltensor", None)


@pytest.mark.parametrize("kind", [3, 13])
def test_capsule_that_torch_cannot_take_is_refused_with_its_reason(cupyx, monkeypatch, kind):
    monkeypatch.setattr(Handmade, "kind", kind)
    A = cupy_operator(MatrixOperator(integer_matrix()))
    message = rf"expected a CuPy array that torch can share on cpu, got .*device_type: {kind}"
    with pytest.raises(VectorError, match=message):
        A @ integers(N).view(Handmade)
    assert A.matvecs == 0


def test_capsule_of_host_memory_is_taken(cupyx, monkeypatch):
    monkeypatch.setattr(Handmade, "kind", 1)  # else the tests above would prove nothing
    A = cupy_operator(MatrixOperator(integer_matrix()))
    np.testing.assert_array_equal(
        A @ integers(N).view(Handmade), integer_matrix().numpy() @ np.asarray(integers(N))
    )


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones(N), "got a numpy.ndarray; pass cupy.asarray"),
        (torch.ones(N), "got a torch.Tensor on cpu; multiply tensors by the operator itself"),
        (torch.ones(N, requires_grad=True), "a torch.Tensor on cpu that requires grad; multiply"),
    ],
)
def test_what_is_no_array_of_cupy_is_refused(cupyx, x, message):
    A = cupy_operator(MatrixOperator(integer_matrix()))
    with pytest.raises(VectorError, match=f"expected a cupy.ndarray on cpu, {message}|{message}"):
        A @ x


def test_block_of_another_size_is_refused_by_name(cupyx):
    A = cupy_operator(MatrixOperator(integer_matrix()))
    with pytest.raises(VectorError, match=r"expected a block of shape \(5, k\), got \(4, 2\)"):
        A._matmat(integers(4, 2))


def test_operator_on_the_cpu_is_refused(cupyx):
    with pytest.raises(
        VectorError, match=r"expected an operator on a CUDA device, got <MatrixOperator .* cpu>; "
    ):
        as_cupy_operator(MatrixOperator(integer_matrix()))


def test_cupy_that_sees_no_gpu_is_named(cupyx, monkeypatch):
    on_cuda = LambdaOperator(N, lambda v: v)
    monkeypatch.setattr(type(on_cuda), "device", torch.device("cuda:0"))
    monkeypatch.setattr(sys.modules["cupy"].cuda, "is_available", lambda: False)
    with pytest.raises(OptionError, match="expected CuPy on NumPy to find the GPU of cuda:0, as"):
        as_cupy_operator(on_cuda)


@pytest.mark.parametrize(
    ("cuda", "extra"), [("12.8", "cuda12"), ("13.0", "cuda13"), (None, "cuda13")]
)
def test_cupy_missing_says_what_to_install(monkeypatch, cuda, extra):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(OptionError, match=rf'needs CuPy: pip install "torchlinop\[{extra}\]"'):
        as_cupy_operator(MatrixOperator(integer_matrix()))


def test_scipy_adapter_points_to_this_one(cupyx, monkeypatch):
    monkeypatch.setattr(Array, "__cuda_array_interface__", {}, raising=False)
    with pytest.raises(VectorError, match=r"cupyx_on_numpy.Array on the GPU; .*as_cupy_operator"):
        as_linear_operator(MatrixOperator(integer_matrix()))._matvec(integers(N))


@pytest.fixture
def on_cpu(monkeypatch, cupyx):
    """Matrices of CuPy are taken for what they are here: matrices on the CPU."""
    monkeypatch.setattr(adapter.torch, "device", lambda *where: CPU)
    monkeypatch.setattr(Array, "__module__", "cupy")
    return cupyx


OF_CUPY = {
    "ndarray": lambda M, linalg: M,
    "LinearOperator": lambda M, linalg: linalg.aslinearoperator(M),
    "expression": lambda M, linalg: linalg.aslinearoperator(M / 2) * 2.0,
}


@pytest.mark.parametrize("kind", OF_CUPY)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
def test_matrix_of_cupy_is_an_operator_of_ours(on_cpu, kind, dtype):
    M = integers(N, N, dtype=dtype)
    M = M + M.conj().T
    op = from_linear_operator(OF_CUPY[kind](M, on_cpu))
    V = torch.from_numpy(np.asarray(integers(N, 2, dtype=np.float64))).to(op.dtype)
    np.testing.assert_array_equal(op @ V, np.asarray(M) @ V.numpy())
    np.testing.assert_array_equal(op @ V[:, 0], np.asarray(M) @ V[:, 0].numpy())


def test_adapter_comes_back_as_the_operator_it_wraps(cupyx):
    op = MatrixOperator(integer_matrix())
    assert from_linear_operator(cupy_operator(op)) is op


def test_identity_of_cupy_gives_memory_of_its_own(on_cpu):
    op = from_linear_operator(on_cpu.IdentityOperator((N, N), dtype=np.float64))
    V = torch.ones(N, 2, dtype=torch.float64)
    op.matmat(V).zero_()
    assert bool((V == 1).all())


def test_product_of_cupy_is_copied_out_of_memory_that_cupy_may_use_again(on_cpu):
    buffer = integers(N, 2)
    reused = on_cpu.LinearOperator(
        (N, N), matvec=lambda x: buffer[:, 0], matmat=lambda X: buffer, dtype=np.float64
    )
    from_linear_operator(reused).matmat(torch.ones(N, 2, dtype=torch.float64)).zero_()
    np.testing.assert_array_equal(buffer, integers(N, 2))


@pytest.mark.parametrize(
    ("of_torch", "of_cupy", "waits"),
    [(0, 0, []), (0, 7, [("wait", 7, 0)]), (7, 0, [("wait", 0, 7)])],
)
def test_cupy_waits_for_the_copy_of_its_product(on_cpu, of_torch, of_cupy, waits):
    op = from_linear_operator(on_cpu.aslinearoperator(integers(N, N)))
    with on_streams(of_torch, of_cupy) as log:
        op @ torch.ones(N, dtype=torch.float64)
    assert [entry for entry in log if entry[0] == "wait"] == waits
    assert [entry[0] for entry in log if entry[0] != "wait"][-1] == "x.__dlpack__"


@pytest.mark.parametrize("name", ["cupy", "cupyx"])
def test_other_libraries_are_not_taken_for_cupy(name):
    assert not adapter.is_of_cupy(np.ones(3))
    assert adapter.is_of_cupy(type("A", (), {"__module__": f"{name}.scipy"})())
