"""Solvers of the installed cupyx on the adapter, executed over NumPy; and our way to call them."""

import sys

import numpy as np
import pytest
import torch
from cupyx_on_numpy import Array, found, installed, on_streams, ours

from torchlinop import LambdaOperator, MatrixOperator
from torchlinop.adapters import cupy_rounds, cupy_solvers
from torchlinop.adapters.cupy import cupy_operator
from torchlinop.adapters.cupy_solvers import cupy_eigsh, cupy_lobpcg
from torchlinop.errors import (
    MemoryEstimateError,
    NonFiniteError,
    NotConvergedError,
    NotConvergedWarning,
    OptionError,
    TorchlinopWarning,
    VectorError,
)

N = 60
SPD = torch.linspace(1, 9, N, dtype=torch.float64)
REAL = [(torch.float64, 1e-9), (torch.float32, 1e-4)]
COMPLEX = [(torch.complex128, 1e-9), (torch.complex64, 1e-4)]


@pytest.fixture
def cupyx(monkeypatch):
    """``cupyx.scipy.sparse.linalg`` over NumPy, on a device that is none."""
    if found() is None:
        pytest.skip("CuPy is not installed")
    for module in (cupy_rounds, cupy_solvers):
        monkeypatch.setattr(module, "as_cupy_operator", cupy_operator)
    with installed() as linalg, on_streams():
        yield linalg


def matrix(values, dtype=torch.float64):
    """A symmetric (Hermitian) matrix with this spectrum."""
    Q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.complex128))[0]
    if not dtype.is_complex:
        Q = torch.linalg.qr(Q.real)[0]
    return ((Q * values) @ Q.mH).to(dtype)


def adapted(M, **options):
    return cupy_operator(MatrixOperator(M), **options)


def block(n, k, dtype):
    return np.random.default_rng(0).standard_normal((n, k)).astype(dtype).view(Array)


# name -> how to ask for a relative residual
SYSTEMS = {
    "cg": lambda tol: {"rtol": tol},
    "cgs": lambda tol: {"rtol": tol},
    "bicgstab": lambda tol: {"rtol": tol},
    "gmres": lambda tol: {"rtol": tol},
    "minres": lambda tol: {"tol": tol},
    "lsmr": lambda tol: {"atol": tol, "btol": tol},
}


def solve(cupyx, name, A, b, tolerance, **options):
    return np.asarray(getattr(cupyx, name)(A, b, **SYSTEMS[name](tolerance / 100), **options)[0])


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize(("dtype", "tolerance"), REAL)
def test_system_is_solved_with_the_matrix_untouched(cupyx, name, dtype, tolerance):
    M = matrix(SPD, dtype)
    before, A = M.clone(), adapted(M)
    b = block(N, 1, A.dtype)[:, 0]
    x = solve(cupyx, name, A, b, tolerance)
    exact = np.linalg.solve(before.double().numpy(), np.asarray(b, np.float64))
    assert np.linalg.norm(x - exact) <= tolerance * np.linalg.norm(exact)
    assert torch.equal(M, before)


@pytest.mark.parametrize("name", ["cg", "bicgstab", "gmres"])
@pytest.mark.parametrize(("dtype", "tolerance"), COMPLEX)
def test_hermitian_system_is_solved(cupyx, name, dtype, tolerance):
    M = matrix(SPD, dtype)
    A = adapted(M)
    b = block(N, 1, A.dtype)[:, 0]
    exact = np.linalg.solve(M.to(torch.complex128).numpy(), np.asarray(b))
    x = solve(cupyx, name, A, b, tolerance)
    assert np.linalg.norm(x - exact) <= tolerance * np.linalg.norm(exact)


@pytest.mark.parametrize("name", ["cg", "cgs", "bicgstab", "gmres"])
def test_adapter_is_a_preconditioner(cupyx, name):
    D = torch.logspace(0, 6, N, dtype=torch.float64)
    A, M = adapted(torch.diag(D)), adapted(torch.diag(1 / D))
    b = block(N, 1, A.dtype)[:, 0]
    x = solve(cupyx, name, A, b, 1e-9, M=M)
    np.testing.assert_allclose(x, np.asarray(b) / D.numpy(), rtol=1e-9, atol=0)
    assert A.matvecs <= 22  # gmres takes 20 whatever they find, and two residuals


@pytest.mark.parametrize("name", ["minres", "lsmr", "gmres"])
def test_solvers_that_write_into_products_spare_a_product_that_hands_its_input_through(cupyx, name):
    A = cupy_operator(LambdaOperator(N, lambda v: v, dtype=torch.float64))
    b = block(N, 1, A.dtype)[:, 0]
    kept = np.asarray(b).copy()
    np.testing.assert_allclose(solve(cupyx, name, A, b, 1e-9), kept, rtol=1e-9)
    np.testing.assert_array_equal(b, kept)


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize(("dtype", "tolerance"), REAL + COMPLEX)
def test_eigsh_finds_the_end_of_the_spectrum(cupyx, which, dtype, tolerance):
    values = torch.linspace(-4, 9, N, dtype=torch.float64)
    A = adapted(matrix(values, dtype))
    w, x = cupyx.eigsh(A, k=4, which=which, tol=tolerance)
    expected = values[:4] if which == "SA" else values[-4:]
    np.testing.assert_allclose(np.asarray(w), expected, atol=9 * tolerance)
    assert (x.dtype, A.matvecs) == (A.dtype, A.matmats)


@pytest.mark.parametrize(("dtype", "tolerance"), REAL)
def test_eigsh_of_a_multiple_takes_as_many_products_as_of_the_matrix(cupyx, dtype, tolerance):
    # A multiple that declares float64 sends it after digits that float32 products do not have.
    A = adapted(matrix(SPD, dtype))
    twice = 2.0 * A
    v0 = block(N, 1, A.dtype)[:, 0]
    w = cupyx.eigsh(A, k=3, v0=v0.copy(), tol=tolerance, return_eigenvectors=False)
    doubled = cupyx.eigsh(twice, k=3, v0=v0.copy(), tol=2 * tolerance, return_eigenvectors=False)
    np.testing.assert_allclose(doubled, 2 * np.asarray(w), rtol=10 * tolerance)
    assert doubled.dtype == A.dtype
    assert abs(A.matvecs - twice.matvecs) <= 32


@pytest.mark.parametrize(("dtype", "tolerance"), REAL)
def test_svds_finds_the_largest_singular_values(cupyx, dtype, tolerance):
    s = cupyx.svds(adapted(matrix(SPD, dtype)), k=3, return_singular_vectors=False)
    np.testing.assert_allclose(np.sort(s), SPD[-3:], rtol=tolerance)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), REAL)
def test_lobpcg_multiplies_whole_blocks(cupyx, largest, dtype, tolerance):
    A = adapted(matrix(SPD, dtype))
    X = block(N, 4, A.dtype)
    w, _ = cupyx.lobpcg(A, X, tol=1e3 * tolerance, maxiter=60, largest=largest)
    expected = SPD.flip(0)[:3] if largest else SPD[:3]
    np.testing.assert_allclose(np.asarray(w)[:3], expected, rtol=1e3 * tolerance)
    assert A.matmats < A.matvecs / 2


def low_rank(rank, n=100, scale=1.0):
    return scale * torch.cat([torch.zeros(n - rank), torch.arange(1.0, rank + 1)]).double()


# ---------------------------------------------------------------- our way to call them


def true_residuals(M, result):
    X = result.eigenvectors.to(torch.promote_types(M.dtype, torch.float64))
    return (M.to(X.dtype) @ X - X * result.eigenvalues.to(X.real.dtype)).norm(dim=0).double()


SPECTRA = {
    "indefinite": torch.linspace(-4, 9, 80, dtype=torch.float64),
    "decaying": 2.0 ** -torch.arange(80, dtype=torch.float64).flip(0),
    "tiny": 1e-8 * torch.linspace(1, 9, 80, dtype=torch.float64),
    "huge": 1e8 * torch.linspace(-1, 9, 80, dtype=torch.float64),
}
CALLS = [
    pytest.param(cupy_eigsh, "LM", id="eigsh-LM"),
    pytest.param(cupy_eigsh, "LA", id="eigsh-LA"),
    pytest.param(cupy_lobpcg, "LA", id="lobpcg-LA"),
]


@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize(("call", "which"), CALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.filterwarnings("ignore:lobpcg of cupyx gave")  # thresholds inside are absolute, too
def test_residuals_are_true_and_relatively_small(cupyx, values, call, which, dtype):
    M = matrix(values, dtype)
    result = call(MatrixOperator(M), 4, which=which, tol=1e-4)
    largest = values.abs().max()
    assert bool(result.converged.all())
    assert "cupyx" in result.method or values is SPECTRA["huge"]
    assert result.residual_kind == "true" or "cupyx" not in result.method
    np.testing.assert_allclose(result.eigenvalues, values.flip(0)[:4], rtol=1e-4)
    residuals = true_residuals(M, result)
    assert bool((residuals <= 1e-4 * result.eigenvalues.abs() + 1e-6 * largest).all())
    assert bool(((residuals - result.residual_norms).abs() <= 2e-6 * largest).all())


@pytest.mark.parametrize("dtype", [torch.complex128, torch.bfloat16])
def test_eigsh_takes_every_dtype_of_operators(cupyx, dtype):
    values = torch.cat([torch.linspace(0, 1, 50), torch.tensor([4.0, 8.0, 16.0])]).double()
    M = matrix(values, dtype)
    exact = torch.linalg.eigvalsh(M.to(torch.promote_types(dtype, torch.float64))).flip(0)[:3]
    result = cupy_eigsh(MatrixOperator(M), 3, tol=0.05)
    np.testing.assert_allclose(result.eigenvalues, exact, rtol=0.01)
    assert result.dtype == dtype


LOW_RANK = {
    "rank 2": low_rank(2),
    "rank 1": low_rank(1),
    "rank 10": low_rank(10),
    "zero": low_rank(0),
    "identity": torch.ones(50, dtype=torch.float64),
    "tiny rank 3": low_rank(3, scale=1e-10),
}


@pytest.mark.parametrize("values", LOW_RANK.values(), ids=LOW_RANK)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("call", [cupy_eigsh, cupy_lobpcg])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy divides by zero aloud, CuPy does not
@pytest.mark.filterwarnings("ignore::torchlinop.TorchlinopWarning")
def test_low_rank_gives_numbers(cupyx, values, dtype, call):
    M = matrix(values, dtype)
    result = call(MatrixOperator(M), 4, which="LA")
    scale = float(values.abs().max())
    tolerance = 1e-3 if dtype == torch.float32 else 1e-6
    np.testing.assert_allclose(
        result.eigenvalues, values.flip(0)[:4], rtol=0, atol=tolerance * scale
    )
    assert result.orthogonality_loss < 1e-5
    assert bool((true_residuals(M, result) <= tolerance * scale).all())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_fall_back_says_so_and_counts_the_products_of_both(cupyx):
    counted = []
    M = matrix(low_rank(2))
    op = LambdaOperator(100, lambda v: counted.append(1) or M @ v, dtype=torch.float64)
    message = "eigsh of cupyx gave .*; the pairs are those of lanczos"
    with pytest.warns(TorchlinopWarning, match=message) as caught:
        result = cupy_eigsh(op, 4)
    assert result.warnings == (str(caught[0].message),)
    assert "Lanczos" in result.method
    assert result.matvecs == len(counted)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.filterwarnings("ignore:eigsh of cupyx gave NaN")
def test_nan_in_memory_that_was_never_written_does_no_harm(cupyx, monkeypatch):
    # In CuPy 14.2, eigsh multiplies the last vector of its empty basis by zero.
    nan = ours(lambda shape, dtype, order="C": np.full(shape, np.nan, dtype, order))
    monkeypatch.setattr(sys.modules["cupy"], "empty", nan)
    result = cupy_eigsh(MatrixOperator(matrix(SPD)), 3)
    np.testing.assert_allclose(result.eigenvalues, SPD.flip(0)[:3], rtol=1e-6)


# As cuBLAS and cuSOLVER raise it in CuPy.
CUBLASError = type("CUBLASError", (RuntimeError,), {"__module__": "cupy_backends.cuda.libs.cublas"})


def raises(error):
    def solver(*args, **kwargs):
        raise error

    return solver


@pytest.mark.parametrize(
    ("stub", "message"),
    [
        (raises(CUBLASError("EXECUTION_FAILED")), r"cupyx failed \(CUBLASError: EXECUTION_FAILED"),
        (lambda *a, **o: (None, np.full((N, 3), np.nan).view(Array)), "cupyx gave NaN"),
        (lambda *a, **o: (None, np.ones((N, 3)).view(Array)), "vectors that are not orthonormal"),
        (lambda *a, **o: a[0] @ None, r"cupyx failed \(AttributeError: "),
    ],
    ids=["library", "nan", "copies", "failure"],
)
@pytest.mark.parametrize(
    ("call", "name"), [(cupy_eigsh, "eigsh"), (cupy_lobpcg, "lobpcg")], ids=["eigsh", "lobpcg"]
)
def test_whatever_goes_wrong_inside_is_named_and_gone_around(
    cupyx, monkeypatch, *, stub, message, call, name
):
    monkeypatch.setattr(cupyx, name, stub)
    with pytest.warns(TorchlinopWarning, match=f"{name} of .*{message}"):
        result = call(MatrixOperator(matrix(SPD)), 3, which="LA")
    np.testing.assert_allclose(result.eigenvalues, SPD.flip(0)[:3], rtol=1e-6)


@pytest.mark.parametrize("error", [VectorError, RuntimeError])
@pytest.mark.parametrize("call", [cupy_eigsh, cupy_lobpcg])
def test_errors_of_products_are_not_taken_for_failures(cupyx, call, error):
    wrong = raises(error("in the product"))
    with pytest.raises(error, match="in the product"):
        call(LambdaOperator(N, wrong, dtype=torch.float64), 3, which="LA")


@pytest.mark.parametrize(("call", "name"), [(cupy_eigsh, "eigsh"), (cupy_lobpcg, "lobpcg")])
def test_cupy_that_runs_out_of_memory_is_named(cupyx, monkeypatch, call, name):
    full = raises(MemoryError("Out of memory allocating 4,000 bytes"))  # CuPy's is such a one
    monkeypatch.setattr(cupyx, name, full)
    message = rf"memory on cpu ran out in {name} of cupyx \(Out of memory.*empty_cache"
    with pytest.raises(MemoryEstimateError, match=message):
        call(MatrixOperator(matrix(SPD)), 3, which="LA")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.filterwarnings("ignore::torchlinop.TorchlinopWarning")
def test_products_that_are_nan_are_an_error(cupyx):
    op = LambdaOperator(N, lambda v: v * float("nan"), dtype=torch.float64)
    with pytest.raises(NonFiniteError, match="hold NaN or infinity"):
        cupy_eigsh(op, 3)


@pytest.mark.parametrize("call", [cupy_eigsh, cupy_lobpcg])
@pytest.mark.parametrize("budget", [60, 100, 150])
def test_budget_is_kept_and_missing_accuracy_is_said(cupyx, call, budget):
    values = torch.linspace(0, 1, 400, dtype=torch.float64) ** 0.1  # next to no gaps
    with pytest.warns(NotConvergedWarning, match="of 3 pairs reached tol=1e-12 after"):
        result = call(MatrixOperator(matrix(values)), 3, budget, which="LA", tol=1e-12)
    assert result.matvecs <= budget
    assert result.status == "maxmatvecs"


@pytest.mark.parametrize("call", [cupy_eigsh, cupy_lobpcg])
def test_strict_raises_with_the_result(cupyx, call):
    op = MatrixOperator(matrix(torch.linspace(0, 1, 400, dtype=torch.float64) ** 0.1))
    with pytest.raises(NotConvergedError, match="of 3 pairs reached") as caught:
        call(op, 3, 60, which="LA", tol=1e-12, strict=True)
    assert caught.value.result.matvecs <= 60


@pytest.mark.parametrize("call", [cupy_eigsh, cupy_lobpcg])
def test_start_is_used_and_left_as_it_was(cupyx, call):
    M = matrix(SPD)
    X = torch.linalg.eigh(M).eigenvectors[:, -3:].sum(1)
    kept = X.clone()
    near = call(MatrixOperator(M), 3, which="LA", v0=X)
    assert torch.equal(X, kept)
    again = call(MatrixOperator(M), 3, which="LA", v0=near)
    np.testing.assert_allclose(again.eigenvalues, SPD.flip(0)[:3], rtol=1e-6)


def test_two_runs_agree(cupyx):
    first, second = (cupy_eigsh(MatrixOperator(M), 3, seed=5) for M in [matrix(SPD)] * 2)
    assert torch.equal(first.eigenvectors, second.eigenvectors)


def test_preconditioner_saves_products_of_lobpcg(cupyx):
    D = torch.logspace(0, 5, 200, dtype=torch.float64)
    op, M = MatrixOperator(torch.diag(D)), MatrixOperator(torch.diag(1 / D))
    with_it = cupy_lobpcg(op, 4, which="SA", preconditioner=M)
    np.testing.assert_allclose(with_it.eigenvalues, D[:4], rtol=1e-6)
    assert with_it.matvecs < 300


def test_lobpcg_of_a_small_matrix_goes_the_dense_way(cupyx):
    result = cupy_lobpcg(MatrixOperator(matrix(SPD[:10])), 4, which="SA")
    np.testing.assert_allclose(result.eigenvalues, SPD[:4], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "options", "message"),
    [
        (cupy_eigsh, {"which": "BE"}, "unknown which 'BE' for cupyx; choose one of LM, LA, SA"),
        (cupy_lobpcg, {"which": "LM"}, "unknown which 'LM' for cupyx; choose one of LA, SA"),
        (cupy_eigsh, {"k": N - 2}, "expected k from 1 to n - 3 = 57 for eigsh of cupyx, got 58"),
        (cupy_eigsh, {"k": 0}, "expected k from 1 to n = 60, got 0"),
        (cupy_eigsh, {"ncv": 4}, r"expected ncv to be at least k \+ 2 = 5, got 4; leave it out"),
        (cupy_eigsh, {"tol": 2.0}, "expected tol from 0 to 1"),
        (cupy_eigsh, {"max_iter": 20}, "to be at least 38, for one round of the solver, got 20"),
        (cupy_lobpcg, {"max_iter": 5}, "to be at least 9, for one round of the solver, got 5"),
    ],
)
def test_bad_options_are_refused_before_a_product(cupyx, call, options, message):
    op = LambdaOperator(N, lambda v: 1 / 0, dtype=torch.float64)
    with pytest.raises(OptionError, match=message):
        call(op, **({"k": 3, "which": "LA"} | options))


@pytest.mark.parametrize("call", [cupy_eigsh, cupy_lobpcg])
def test_operator_on_the_cpu_is_refused(cupyx, monkeypatch, call):
    monkeypatch.undo()
    with pytest.raises((VectorError, OptionError), match=r"CUDA device|needs CuPy"):
        call(MatrixOperator(matrix(SPD)), 3, which="LA")
