"""The adapter is a SciPy LinearOperator: NumPy's shapes, dtypes and memory, SciPy's algebra."""

import copy
import gc
import io
import pickle
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy
import scipy.sparse
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator, eigsh, lobpcg

from torchlinop import (
    CurvatureOperator,
    LambdaOperator,
    MatrixOperator,
    VectorSpace,
    as_linear_operator,
    from_linear_operator,
)
from torchlinop.errors import ProductBudgetError, VectorError
from torchlinop.testing.gallery import with_spectrum

N = 5
SCIPY = tuple(int(part) for part in scipy.__version__.split(".")[:2])
batches = pytest.mark.skipif(SCIPY < (1, 18), reason="SciPy takes batches from 1.18 on")
no_column_vectors = pytest.mark.skipif(
    SCIPY >= (1, 18), reason="SciPy warns from 1.18 on that column vectors are matrices"
)


def integer_matrix(dtype=torch.float64, n=N):
    """A symmetric (Hermitian) matrix of small integers: products with integers are exact."""
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    A = ((i * j + i + j) % 5 - 2).double()
    return (A + 1j * torch.sign(i - j) if dtype.is_complex else A).to(dtype)


def integers(*shape, dtype=np.float64):
    x = (np.arange(np.prod(shape, dtype=int)) * 3 % 7 - 2).reshape(shape)
    return (x * (1 - 1j) if np.dtype(dtype).kind == "c" else x).astype(dtype)


def dense(dtype=torch.float64):
    """``integer_matrix`` as NumPy's widest dtype of its kind, the oracle of exact products."""
    return integer_matrix(dtype).to(torch.complex128 if dtype.is_complex else torch.float64).numpy()


class Spy(CurvatureOperator):
    """A matrix that remembers where its blocks and their products lay."""

    def __init__(self, matrix):
        super().__init__(VectorSpace(len(matrix), matrix.dtype, matrix.device))
        self.matrix, self.given, self.returned = matrix, [], []

    def _matmat(self, V):
        AV = self.matrix @ V
        self.given.append(V.data_ptr())
        self.returned.append(AV.data_ptr())
        return AV


SHAPES = [
    pytest.param(integers(N), id="vector"),
    pytest.param(integers(2 * N)[::2], id="strided-vector"),
    pytest.param(integers(N)[::-1], id="reversed-vector"),
    pytest.param(integers(N, 3), id="C-block"),
    pytest.param(integers(3, N).T, id="F-block"),
    pytest.param(integers(2 * N, 6)[::2, 1::2], id="strided-block"),
    pytest.param(integers(N, 3)[::-1, ::-1], id="reversed-block"),
    pytest.param(np.broadcast_to(integers(N, 1), (N, 3)), id="broadcast-block"),
    pytest.param(integers(N, N), id="square-block"),
    pytest.param(integers(N, 1), id="column"),
    pytest.param(integers(N, 0), id="no-columns"),
    pytest.param(integers(2, N, 3), id="batch", marks=batches),
    pytest.param(integers(2, 3, N, 1), id="batch-of-batches", marks=batches),
    pytest.param(integers(0, N, 3), id="no-blocks", marks=batches),
]


@pytest.mark.parametrize("x", SHAPES)
def test_product_is_numpys_product(x):
    A = as_linear_operator(MatrixOperator(integer_matrix()))
    np.testing.assert_array_equal(A @ x, dense() @ x, strict=True)


@pytest.mark.parametrize("x", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_adjoint_and_transposed_products_are_numpys_products(x, dtype):
    A = as_linear_operator(MatrixOperator(integer_matrix(dtype)))
    np.testing.assert_array_equal(A.H @ x, dense(dtype).conj().T @ x, strict=True)
    np.testing.assert_array_equal(A.T @ x, dense(dtype).T @ x, strict=True)


@pytest.mark.parametrize(
    "x",
    [
        pytest.param([1, 2, 3, 4, 5], id="list"),
        pytest.param((1.0, 2.0, 3.0, 4.0, 5.0), id="tuple"),
        pytest.param(torch.arange(5.0, dtype=torch.float64), id="tensor"),
        pytest.param([[1, 2], [3, 4], [5, 6], [7, 8], [9, 0]], id="list-of-rows"),
    ],
)
def test_product_takes_what_numpy_takes(x):
    A = as_linear_operator(MatrixOperator(integer_matrix()))
    np.testing.assert_array_equal(A @ x, dense() @ np.asarray(x), strict=True)


@pytest.mark.parametrize("multiply", ["matvec", "rmatvec"])
@pytest.mark.parametrize(
    "x",
    [
        pytest.param(integers(N), id="vector"),
        pytest.param(integers(N, 1), id="column", marks=no_column_vectors),
        pytest.param(integers(N, 1).view(np.matrix), id="np.matrix"),
    ],
)
def test_matvec_of_a_vector_has_its_shape_and_type(multiply, x):
    A = as_linear_operator(MatrixOperator(integer_matrix()))
    y = getattr(A, multiply)(x)
    assert type(y) is type(x)
    np.testing.assert_array_equal(y, dense() @ x, strict=True)


@batches
@pytest.mark.parametrize("multiply", ["matvec", "rmatvec"])
@pytest.mark.parametrize("shape", [(3, N), (N, N), (1, N), (2, 3, N), (N, 2, N), (0, N)])
def test_matvec_of_a_batch_multiplies_every_row(multiply, shape):
    A = as_linear_operator(MatrixOperator(integer_matrix()))
    X = integers(*shape)
    np.testing.assert_array_equal(getattr(A, multiply)(X), X @ dense().T, strict=True)


@pytest.mark.parametrize("multiply", ["_matvec", "_rmatvec"])
def test_private_matvec_of_a_column_is_a_column(multiply):
    # PyLops and SciPy's compositions call it without SciPy's checks, on every version.
    A = as_linear_operator(MatrixOperator(integer_matrix()))
    x = integers(N, 1)
    np.testing.assert_array_equal(getattr(A, multiply)(x), dense() @ x, strict=True)


@pytest.mark.parametrize("multiply", ["matmat", "rmatmat"])
@pytest.mark.parametrize("k", [0, 1, 3, N])
def test_matmat_multiplies_every_column(multiply, k):
    A = as_linear_operator(MatrixOperator(integer_matrix()))
    X = integers(N, k)
    np.testing.assert_array_equal(getattr(A, multiply)(X), dense() @ X, strict=True)


@pytest.mark.parametrize("container", [scipy.sparse.csr_array, scipy.sparse.csc_matrix])
def test_product_with_a_sparse_matrix_is_dense(container):
    A = as_linear_operator(MatrixOperator(integer_matrix()))
    X = integers(N, 3)
    np.testing.assert_array_equal(A @ container(X), dense() @ X, strict=True)


@pytest.mark.parametrize(
    ("multiply", "x"),
    [
        pytest.param("dot", integers(1, N), id="row"),
        pytest.param("dot", integers(N + 1), id="long-vector"),
        pytest.param("dot", integers(3, N), id="rows"),
        pytest.param("matmat", integers(N + 1, 2), id="tall-block"),
        pytest.param("matvec", integers(N, 2), id="block-as-vector"),
        pytest.param("matvec", integers(N, 2).view(np.matrix), id="np.matrix-as-vector"),
        pytest.param("matvec", integers(2, N).T.view(np.matrix), id="F-np.matrix-as-vector"),
        pytest.param("_matvec", integers(N, 2), id="block-as-private-vector"),
        pytest.param("_rmatvec", integers(N, 2), id="block-as-private-adjoint-vector"),
    ],
)
def test_a_wrong_shape_is_a_value_error(multiply, x):
    A = as_linear_operator(MatrixOperator(integer_matrix()))
    with pytest.raises(ValueError, match=r"[Dd]imension mismatch|expected"):
        getattr(A, multiply)(x)


OPERATOR_DTYPES = [
    (torch.float32, np.float32),
    (torch.float64, np.float64),
    (torch.bfloat16, np.float32),
    (torch.float16, np.float32),
    (torch.complex64, np.complex64),
    (torch.complex128, np.complex128),
]
INPUT_DTYPES = ["?", "i1", "i8", "u2", "f2", "f4", "f8", "g", "F", "D", "G", ">f4", ">f8", ">c8"]


@pytest.mark.parametrize(("dtype", "declared"), OPERATOR_DTYPES)
@pytest.mark.parametrize("given", INPUT_DTYPES)
@pytest.mark.parametrize("shape", [(N,), (N, 3)])
def test_product_is_promoted_as_numpy_promotes(dtype, declared, given, shape):
    A = as_linear_operator(MatrixOperator(integer_matrix(dtype)))
    x = np.abs(integers(*shape)).astype(given) if given == "u2" else integers(*shape, dtype=given)
    assert A.dtype == declared
    promoted = np.result_type(declared, np.dtype(given))
    expected = (dense(dtype) @ x.astype(x.dtype.newbyteorder("="))).astype(promoted)
    np.testing.assert_array_equal(A @ x, expected, strict=True)


@pytest.mark.parametrize(("dtype", "declared"), OPERATOR_DTYPES)
@pytest.mark.parametrize("shape", [(N,), (N, 3), (N, 0)])
def test_real_operator_acts_on_both_parts_of_a_complex_vector(dtype, declared, shape):
    A = as_linear_operator(MatrixOperator(integer_matrix(dtype)))
    x = integers(*shape) + 1j * integers(*shape)[::-1]
    np.testing.assert_array_equal(A @ x, dense(dtype) @ x, strict=True)
    assert A.matmats == (np.prod(shape) > 0)  # both parts in one call


def test_infinite_imaginary_part_leaves_the_real_part_alone():
    A = as_linear_operator(LambdaOperator(2, lambda v: 2 * v, dtype=torch.float64))
    np.testing.assert_array_equal(A @ [complex(1, np.inf), 3j], [complex(2, np.inf), 6j])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_operator_computes_in_half_precision(dtype):
    A = as_linear_operator(LambdaOperator(N, lambda v: v * 1, dtype=dtype))
    x = np.linspace(1, 2, N)
    rounded = torch.from_numpy(x).float().to(dtype).double().numpy()
    np.testing.assert_array_equal(A @ x, rounded, strict=True)


# Where a solver's vectors lie: of the operator's dtype in positive strides, and otherwise.
SHARED = {
    "vector": lambda: integers(N),
    "strided-vector": lambda: integers(2 * N)[::2],
    "column": lambda: integers(N, 1),
    "C-block": lambda: integers(N, 3),
    "F-block": lambda: integers(3, N).T,
    "strided-block": lambda: integers(2 * N, 6)[::2, 1::2],
}
COPIED = {
    "reversed-vector": lambda: integers(N)[::-1],
    "float32-vector": lambda: integers(N, dtype=np.float32),
    "int8-block": lambda: integers(N, 3, dtype=np.int8),
    "complex-block": lambda: integers(N, 3, dtype=np.complex128),
    "big-endian-vector": lambda: integers(N, dtype=">f8"),
}


@pytest.mark.parametrize("memory", SHARED)
def test_operator_reads_the_memory_of_the_solver(memory):
    spy, x = Spy(integer_matrix()), SHARED[memory]()
    as_linear_operator(spy) @ x
    assert spy.given == [x.ctypes.data]


@pytest.mark.parametrize("memory", SHARED | COPIED)
def test_solver_gets_the_memory_of_the_operator(memory):
    spy, x = Spy(integer_matrix()), (SHARED | COPIED)[memory]()
    y = as_linear_operator(spy) @ x
    assert (y.ctypes.data in spy.returned) == (y.dtype == np.float64)


def matrix_times(V):
    return integer_matrix() @ V


def into_one_buffer():
    buffers = {}

    def product(V):
        buffer = buffers.setdefault(V.shape, torch.empty_like(V))
        return buffer.copy_(matrix_times(V))

    return product


def always_one_parameter():
    parameters = {}
    return lambda V: parameters.setdefault(V.shape, torch.nn.Parameter(torch.zeros_like(V)))


def times_a_parameter():
    ones = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def product(V):
        with torch.enable_grad():
            return ones * V

    return product


def in_inference_mode():
    def product(V):
        with torch.inference_mode():
            return matrix_times(V)

    return product


# Products in memory that is not the solver's to write to, or that NumPy cannot see as it is.
PRODUCTS = {
    "fresh": (lambda: matrix_times, dense()),
    "Fortran": (lambda: lambda V: matrix_times(V).t().contiguous().t(), dense()),
    "its-input": (lambda: lambda V: V, np.eye(N)),
    "view-of-its-input": (lambda: lambda V: V.view(V.shape), np.eye(N)),
    "flipped": (lambda: lambda V: V.flip(0), np.eye(N)[::-1]),
    "its-buffer": (into_one_buffer, dense()),
    "its-parameter": (always_one_parameter, np.zeros((N, N))),
    "requires-grad": (times_a_parameter, np.eye(N)),
    "inference": (in_inference_mode, dense()),
    "neg-bit": (lambda: lambda V: torch.complex(V, -matrix_times(V)).conj().imag, dense()),
    "real-part": (lambda: lambda V: torch.complex(matrix_times(V), V).conj().real, dense()),
    "expanded": (lambda: lambda V: V.sum(0).expand(V.shape), np.ones((N, N))),
}


def product_of(name):
    make, matrix = PRODUCTS[name]
    product = make()
    operator = LambdaOperator(N, product, matmat=product, dtype=torch.float64)
    return as_linear_operator(operator), matrix


def poison(x):
    x.fill(np.nan if np.issubdtype(x.dtype, np.inexact) else 77)


@pytest.mark.parametrize("memory", SHARED | COPIED)
@pytest.mark.parametrize("product", PRODUCTS)
def test_product_is_right_whatever_memory_it_comes_in(product, memory):
    A, matrix = product_of(product)
    x = (SHARED | COPIED)[memory]()
    np.testing.assert_array_equal(A @ x, matrix @ x)


@pytest.mark.parametrize("memory", SHARED | COPIED)
@pytest.mark.parametrize("product", PRODUCTS)
def test_product_is_writable_and_contiguous(product, memory):
    A, _ = product_of(product)
    flags = (A @ (SHARED | COPIED)[memory]()).flags
    assert flags.writeable
    assert flags.aligned
    assert flags.c_contiguous or flags.f_contiguous


@batches
@pytest.mark.parametrize("multiply", ["matvec", "matmat"])
@pytest.mark.parametrize("shape", [(2, N, N), (3, 2, N, N)])
def test_products_of_a_batch_are_writable_and_contiguous(multiply, shape):
    A = as_linear_operator(MatrixOperator(integer_matrix()))
    flags = getattr(A, multiply)(integers(*shape)).flags
    assert flags.writeable
    assert flags.c_contiguous or flags.f_contiguous


@pytest.mark.parametrize("memory", SHARED | COPIED)
@pytest.mark.parametrize("product", PRODUCTS)
def test_product_shares_no_memory_with_its_input_or_the_next_product(product, memory):
    A, _ = product_of(product)
    x = (SHARED | COPIED)[memory]()
    y, z = A @ x, A @ x
    assert not np.shares_memory(x, y)
    assert not np.shares_memory(y, z)


@pytest.mark.parametrize("memory", SHARED | COPIED)
@pytest.mark.parametrize("product", PRODUCTS)
def test_input_is_left_as_it_was(product, memory):
    A, _ = product_of(product)
    x = (SHARED | COPIED)[memory]()
    before = x.tobytes()
    A @ x
    assert x.tobytes() == before


@pytest.mark.parametrize("memory", SHARED | COPIED)
@pytest.mark.parametrize("product", PRODUCTS)
def test_product_outlives_its_input(product, memory):
    A, _ = product_of(product)
    x = (SHARED | COPIED)[memory]()
    y = A @ x
    before = y.copy()
    poison(x)
    np.testing.assert_array_equal(y, before, strict=True)


@pytest.mark.parametrize("memory", SHARED | COPIED)
@pytest.mark.parametrize("product", PRODUCTS)
def test_operator_outlives_its_products(product, memory):
    A, _ = product_of(product)
    x = (SHARED | COPIED)[memory]()
    y = A @ x
    before = y.copy()
    poison(y)
    np.testing.assert_array_equal(A @ x, before, strict=True)


class Identity(CurvatureOperator):
    """I, which hands its input through."""

    def _matmat(self, V):
        return V


@pytest.mark.parametrize("memory", SHARED | COPIED)
def test_product_with_the_identity_is_a_copy(memory):
    A = as_linear_operator(Identity(VectorSpace(N, torch.float64, torch.device("cpu"))))
    x = (SHARED | COPIED)[memory]()
    y = A @ x
    np.testing.assert_array_equal(y, x)
    assert not np.shares_memory(x, y)


def test_product_shares_no_memory_with_the_matrix():
    matrix = integer_matrix()
    A = as_linear_operator(MatrixOperator(matrix))
    assert not np.shares_memory(A @ np.eye(N), matrix.numpy())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda v: v[:-1], r"of shape \(5,\).* got torch.float64 of shape \(4,\)|\(4, 1\)"),
        (lambda v: v.float(), "expected the product to return torch.float64 .* got torch.float32"),
        (lambda v: v.to("meta"), "on cpu, got .* on meta"),
    ],
    ids=["shape", "dtype", "device"],
)
def test_product_of_another_kind_is_refused(wrong, message):
    A = as_linear_operator(LambdaOperator(N, wrong, dtype=torch.float64))
    with pytest.raises(VectorError, match=message):
        A @ np.ones(N)


def test_not_a_number_passes_through():
    A = as_linear_operator(MatrixOperator(torch.eye(N, dtype=torch.float64) * torch.nan))
    assert np.isnan(A @ np.ones(N)).all()


@pytest.mark.parametrize(
    ("x", "columns"),
    [
        pytest.param(integers(N), 1, id="vector"),
        pytest.param(integers(N, 1), 1, id="column"),
        pytest.param(integers(N, 4), 4, id="block"),
        pytest.param(integers(N, 4) * 1j, 8, id="complex-block"),
        pytest.param(scipy.sparse.eye_array(N).tocsr(), N, id="sparse"),
        pytest.param(integers(2, N, 3), 6, id="batch", marks=batches),
    ],
)
def test_a_product_is_one_call_of_the_operator(x, columns):
    A = as_linear_operator(MatrixOperator(integer_matrix()))
    A @ x
    assert (A.matmats, A.matvecs) == (1, columns)


def test_no_columns_cost_no_product():
    A = as_linear_operator(MatrixOperator(integer_matrix()), max_matvecs=0)
    A @ np.zeros((N, 0))
    assert (A.matmats, A.matvecs) == (0, 0)


def identity(dtype):
    return aslinearoperator(scipy.sparse.eye_array(N, dtype=dtype))


ALGEBRA = {
    "2 A": (lambda A, S: 2 * A, lambda M: 2 * M),
    "A 2": (lambda A, S: A * 2, lambda M: 2 * M),
    "2.0 A": (lambda A, S: 2.0 * A, lambda M: 2 * M),
    "float64(2) A": (lambda A, S: np.float64(2) * A, lambda M: 2 * M),
    "float32(2) A": (lambda A, S: np.float32(2) * A, lambda M: 2 * M),
    "A int64(2)": (lambda A, S: A * np.int64(2), lambda M: 2 * M),
    "A / 2": (lambda A, S: A / 2, lambda M: M / 2),
    "-A": (lambda A, S: -A, lambda M: -M),
    "-(2 A)": (lambda A, S: -(2 * A), lambda M: -2 * M),
    "A + A": (lambda A, S: A + A, lambda M: 2 * M),
    "A - A / 2": (lambda A, S: A - A / 2, lambda M: M / 2),
    "A A": (lambda A, S: A @ A, lambda M: M @ M),
    "A**0": (lambda A, S: A**0, lambda M: np.eye(N)),
    "A**2": (lambda A, S: A**2, lambda M: M @ M),
    "(A A).H": (lambda A, S: (A @ A).H, lambda M: (M @ M).conj().T),
    "(A + A).T": (lambda A, S: (A + A).T, lambda M: 2 * M.T),
    "(2 A).H": (lambda A, S: (2 * A).H, lambda M: 2 * M.conj().T),
    "(2 A).T": (lambda A, S: (2 * A).T, lambda M: 2 * M.T),
    "A + S": (lambda A, S: A + S, lambda M: M + np.eye(N)),
    "S + A": (lambda A, S: S + A, lambda M: M + np.eye(N)),
    "S - A": (lambda A, S: S - A, lambda M: np.eye(N) - M),
    "A S": (lambda A, S: A @ S, lambda M: M),
    "S A": (lambda A, S: S @ A, lambda M: M),
    "A (S + A)": (lambda A, S: A @ (S + A), lambda M: M @ (np.eye(N) + M)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("shape", [(N,), (N, 3)])
@pytest.mark.parametrize("expression", ALGEBRA)
def test_expressions_of_adapters_are_those_of_matrices(expression, shape, dtype):
    A = as_linear_operator(MatrixOperator(integer_matrix(dtype)))
    of_operators, of_matrices = ALGEBRA[expression]
    C = of_operators(A, identity(A.dtype))
    x = integers(*shape, dtype=A.dtype)
    expected = (of_matrices(dense(dtype)) @ x).astype(A.dtype)
    assert C.dtype == A.dtype
    np.testing.assert_array_equal(C @ x, expected, strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("shape", [(N,), (1, N), (3, N)])
def test_vector_times_adapter_is_vector_times_matrix(shape, dtype):
    A = as_linear_operator(MatrixOperator(integer_matrix(dtype)))
    x = integers(*shape, dtype=A.dtype)
    np.testing.assert_array_equal(x @ A, (x @ dense(dtype)).astype(A.dtype), strict=True)


def test_complex_multiple_of_a_real_adapter_is_complex():
    A = as_linear_operator(MatrixOperator(integer_matrix()))
    x = integers(N)
    np.testing.assert_array_equal((2j * A) @ x, 2j * (dense() @ x), strict=True)
    np.testing.assert_array_equal((2j * A).H @ x, -2j * (dense() @ x), strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_real_adapter_is_its_own_adjoint_and_transpose(dtype):
    A = as_linear_operator(MatrixOperator(integer_matrix(dtype)))
    assert A.H is A
    assert A.T is A


def test_complex_adapter_is_its_own_adjoint():
    A = as_linear_operator(MatrixOperator(integer_matrix(torch.complex64)))
    assert A.H is A


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_multiple_of_a_half_precision_adapter_is_scaled_after_rounding(dtype):
    A = 0.5 * as_linear_operator(MatrixOperator(integer_matrix(dtype)))
    np.testing.assert_array_equal(A @ integers(N), dense() @ integers(N) / 2, strict=True)
    assert A.dtype == np.float32


def test_adapter_is_a_linear_operator_of_scipy():
    A = as_linear_operator(MatrixOperator(integer_matrix()))
    assert isinstance(A, LinearOperator)
    assert aslinearoperator(A) is A
    assert A.args == ()
    assert repr(A).startswith("<SciPyOperator of <MatrixOperator 5x5 float64 cpu")


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda A: pickle.loads(pickle.dumps(A))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_duplicate_multiplies_alike_and_counts_anew(duplicate):
    A = as_linear_operator(MatrixOperator(integer_matrix(torch.float32)), max_matvecs=4)
    A @ np.ones((N, 3))
    B = duplicate(A)
    np.testing.assert_array_equal(B @ integers(N, 4), A.operator.matrix.numpy() @ integers(N, 4))
    assert (A.matvecs, B.matvecs) == (3, 4)
    with pytest.raises(ProductBudgetError):
        B @ integers(N)


def test_two_threads_share_one_adapter():
    A = as_linear_operator(MatrixOperator(with_spectrum(torch.linspace(1, 9, 40).double())[0]))

    def largest(seed):
        v0 = np.random.default_rng(seed).standard_normal(40)
        return [eigsh(A, k=2, v0=v0, return_eigenvectors=False) for _ in range(10)]

    with ThreadPoolExecutor(2) as pool:
        concurrent = list(pool.map(largest, [0, 1]))
    np.testing.assert_allclose(concurrent, [largest(0), largest(1)], rtol=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("memory", SHARED | COPIED)
def test_product_is_the_same_in_every_grad_mode(mode, memory):
    matrix = integer_matrix().requires_grad_()
    A = as_linear_operator(LambdaOperator(N, lambda v: matrix @ v, dtype=torch.float64))
    x = (SHARED | COPIED)[memory]()
    with mode():
        y = A @ x
    np.testing.assert_array_equal(y, dense() @ x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("memory", SHARED | COPIED)
def test_product_that_differentiates_works_in_every_grad_mode(mode, memory):
    def second_derivative_of_quadratic(v):
        with torch.enable_grad():
            theta = torch.ones(N, dtype=torch.float64, requires_grad=True)
            value = theta @ integer_matrix() @ theta / 2
            (gradient,) = torch.autograd.grad(value, theta, create_graph=True)
            return torch.autograd.grad(gradient, theta, v)[0]

    A = as_linear_operator(LambdaOperator(N, second_derivative_of_quadratic, dtype=torch.float64))
    x = (SHARED | COPIED)[memory]()
    with mode():
        y = A @ x
    np.testing.assert_array_equal(y, dense() @ x)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize(
    "solve",
    [
        lambda A: eigsh(A, k=1),
        lambda A: lobpcg(A, np.ones((40, 1))),
        lambda A: scipy.sparse.linalg.cg(A, np.ones(40)),
    ],
    ids=["eigsh", "lobpcg", "cg"],
)
def test_error_in_a_product_leaves_the_solver(solve, error):
    def broken(v):
        raise error("in the product")

    with pytest.raises(error, match="in the product"):
        solve(as_linear_operator(LambdaOperator(40, broken, dtype=torch.float64)))


@pytest.mark.parametrize("max_matvecs", [0, 1, 7])
def test_solver_stops_at_its_budget(max_matvecs):
    matrix, _ = with_spectrum(torch.linspace(1, 9, 40).double())
    A = as_linear_operator(MatrixOperator(matrix), max_matvecs=max_matvecs)
    message = f"{max_matvecs} of {max_matvecs} products are used up, and 1 more were asked for"
    with pytest.raises(ProductBudgetError, match=message):
        eigsh(A, k=1)
    assert A.matvecs == max_matvecs


def test_block_beyond_the_budget_is_not_multiplied():
    A = as_linear_operator(MatrixOperator(integer_matrix()), max_matvecs=5)
    A @ integers(N, 3)
    with pytest.raises(ProductBudgetError, match="3 of 5 products are used up, and 3 more"):
        A @ integers(N, 3)
    assert (A.matvecs, A.matmats) == (3, 1)


def test_progress_is_silent_without_a_terminal(capfd):
    A = as_linear_operator(MatrixOperator(integer_matrix()), max_matvecs=9, progress=True)
    A @ integers(N, 3)
    del A
    assert capfd.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False)])
def test_progress_counts_products_on_a_terminal(monkeypatch, progress, shown):
    monkeypatch.setattr(sys, "stderr", Terminal())
    A = as_linear_operator(MatrixOperator(integer_matrix()), max_matvecs=4, progress=progress)
    A @ integers(N, 4)
    del A
    assert ("4/4" in sys.stderr.getvalue()) == shown


@pytest.mark.parametrize(
    "use",
    [
        lambda A: A @ np.ones(N),
        lambda A: A @ np.ones((N, 2), dtype=np.complex64),
        lambda A: A.H @ (A.T @ np.ones(N)),
        lambda A: (2 * A - A / 3) @ np.ones(N),
        lambda A: np.ones(N) @ A,
        lambda A: eigsh(A, k=1),
    ],
    ids=["vector", "complex-block", "adjoint", "expression", "from-the-left", "eigsh"],
)
def test_operator_is_freed_with_its_adapter(use):
    operator = MatrixOperator(integer_matrix())
    A = as_linear_operator(operator)
    freed = weakref.ref(operator)
    gc.disable()
    try:
        use(A)
        del A, operator
        assert freed() is None  # by reference counting: nothing points in a circle
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("of_another_library", "dtype"),
    [
        pytest.param(lambda M: M, torch.float64, id="ndarray"),
        pytest.param(lambda M: M.astype(np.float32), torch.float32, id="float32"),
        pytest.param(lambda M: M.astype(np.int64), torch.float64, id="int64"),
        pytest.param(lambda M: M.astype(np.float16), torch.float64, id="float16"),
        pytest.param(lambda M: M.astype(">f4"), torch.float32, id="big-endian"),
        pytest.param(lambda M: M[::-1, ::-1].copy()[::-1, ::-1], torch.float64, id="reversed"),
        pytest.param(lambda M: M.view(np.matrix), torch.float64, id="np.matrix"),
        pytest.param(scipy.sparse.csr_array, torch.float64, id="csr_array"),
        pytest.param(scipy.sparse.coo_matrix, torch.float64, id="coo_matrix"),
        pytest.param(
            lambda M: scipy.sparse.csr_array(M.astype(np.int8)), torch.float64, id="int8-csr"
        ),
        pytest.param(aslinearoperator, torch.float64, id="LinearOperator"),
        pytest.param(
            lambda M: aslinearoperator(M.astype(np.float32)), torch.float32, id="float32-operator"
        ),
        pytest.param(
            lambda M: aslinearoperator(M) @ aslinearoperator(np.eye(N)), torch.float64, id="product"
        ),
        pytest.param(
            lambda M: LinearOperator((N, N), matvec=lambda x: M @ x), torch.float64, id="callable"
        ),
        pytest.param(torch.from_numpy, torch.float64, id="tensor"),
        pytest.param(lambda M: torch.from_numpy(M).bfloat16(), torch.bfloat16, id="bfloat16"),
    ],
)
@pytest.mark.parametrize("k", [1, 3])
def test_matrix_of_another_library_is_an_operator(of_another_library, dtype, k):
    operator = from_linear_operator(of_another_library(dense()))
    X = integers(N, k)
    V = torch.from_numpy(X).to(dtype)
    assert operator.dtype == dtype
    np.testing.assert_array_equal(operator.matmat(V).double().numpy(), dense() @ X)
    np.testing.assert_array_equal(operator.matvec(V[:, 0]).double().numpy(), dense() @ X[:, 0])


@pytest.mark.parametrize("convert", [np.asarray, scipy.sparse.csr_array, aslinearoperator])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_hermitian_matrix_of_another_library_is_an_operator(convert, dtype):
    operator = from_linear_operator(convert(integer_matrix(dtype).numpy()))
    assert operator.dtype == dtype
    np.testing.assert_array_equal(operator.to_dense().numpy(), integer_matrix(dtype).numpy())


def test_operator_of_an_ndarray_uses_its_entries_in_place():
    M = dense().copy()
    operator = from_linear_operator(M)
    assert operator.matrix.data_ptr() == M.ctypes.data


@pytest.mark.parametrize("wrap", [as_linear_operator, lambda operator: operator])
def test_our_own_operator_comes_back_itself(wrap):
    operator = MatrixOperator(integer_matrix())
    assert from_linear_operator(wrap(operator)) is operator


def test_expression_of_adapters_comes_back_as_an_operator():
    A = as_linear_operator(MatrixOperator(integer_matrix()))
    back = from_linear_operator(A @ A + aslinearoperator(np.eye(N)))
    np.testing.assert_array_equal(back.to_dense().numpy(), dense() @ dense() + np.eye(N))


def test_identity_of_scipy_gives_fresh_memory():
    operator = from_linear_operator(identity(np.float64))
    V = torch.ones(N, 2, dtype=torch.float64)
    operator.matmat(V).zero_()
    assert bool((V == 1).all())


@pytest.mark.parametrize(
    "A",
    [
        np.ones((2, 3)),
        np.ones(3),
        np.ones((2, 3, 3)),
        scipy.sparse.csr_array((2, 3)),
        aslinearoperator(np.ones((2, 3))),
        torch.ones(2, 3),
    ],
    ids=["ndarray", "vector", "batch", "csr_array", "LinearOperator", "tensor"],
)
def test_matrix_that_is_not_square_is_refused(A):
    with pytest.raises(VectorError, match=r"expected a square matrix, got shape \("):
        from_linear_operator(A)
