"""Solvers of SciPy, driven through the adapter, find what dense NumPy finds."""

from functools import partial
from inspect import signature

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.sparse.linalg as sla
import torch
from scipy.linalg import interpolative

from torchlinop import HessianOperator, LambdaOperator, MatrixOperator, as_linear_operator
from torchlinop.testing.gallery import mlp, with_spectrum
from torchlinop.testing.oracles import dense_hessian

N = 30
SPECTRA = {
    "definite": torch.linspace(1, 10, N),
    "indefinite": torch.linspace(-6, 10, N),  # |λ| from 0.07 to 10, no two alike
    "identity": torch.ones(N),
    "low rank": torch.cat([torch.zeros(N - 5), torch.arange(1.0, 6.0)]),
}


def by_products(matrix):
    return LambdaOperator(len(matrix), lambda v: matrix @ v, dtype=matrix.dtype)


kinds = pytest.mark.parametrize("kind", [MatrixOperator, by_products])
precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
SEED = {"rng" if "rng" in signature(sla.svds).parameters else "random_state": 0}
takes_rng = pytest.mark.skipif(
    "rng" not in signature(interpolative.svd).parameters, reason="from SciPy 1.15 on"
)


def problem(spectrum, dtype, kind=MatrixOperator, seed=0):
    """An adapter, and the very matrix it holds in float64 (for float32: after rounding)."""
    matrix = with_spectrum(SPECTRA[spectrum].double(), seed)[0].to(dtype)
    return as_linear_operator(kind(matrix)), matrix.double().numpy()


def adapter(matrix, dtype):
    return as_linear_operator(MatrixOperator(torch.from_numpy(matrix).to(dtype)))


def gaussian(*shape, dtype=np.float64, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def rounding(A, D):
    """n u ‖D‖: what the rounding of products leaves open in an eigenvalue (Weyl), twice."""
    return 2 * len(D) * np.finfo(A.dtype).eps * max(np.linalg.norm(D, 2), 1)


def assert_eigenpairs(D, values, V, expected, tolerance, *, M=None, inner=None):
    """``D V = M V diag(values)``, with the expected values, V orthonormal in M or in ``inner``."""
    M = np.eye(len(D)) if M is None else M
    inner = M if inner is None else inner
    np.testing.assert_allclose(np.sort(values), np.sort(expected), rtol=0, atol=tolerance)
    np.testing.assert_allclose(D @ V, M @ V * values, rtol=0, atol=tolerance)
    np.testing.assert_allclose(V.conj().T @ inner @ V, np.eye(len(values)), rtol=0, atol=tolerance)


EXTREMES = {
    "LM": lambda w: w[np.argsort(abs(w))[-3:]],
    "SM": lambda w: w[np.argsort(abs(w))[:3]],
    "LA": lambda w: w[-3:],
    "SA": lambda w: w[:3],
    "BE": lambda w: w[[0, -2, -1]],
}


@kinds
@precisions
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("which", EXTREMES)
def test_eigsh_finds_the_extreme_eigenpairs(which, spectrum, dtype, kind):
    A, D = problem(spectrum, dtype, kind)
    values, V = sla.eigsh(A, k=3, which=which, v0=gaussian(N, dtype=A.dtype))
    assert values.dtype == A.dtype
    assert_eigenpairs(D, values, V, EXTREMES[which](np.linalg.eigvalsh(D)), rounding(A, D))


@precisions
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_eigs_finds_the_eigenvalues_of_largest_modulus(spectrum, dtype):
    A, D = problem(spectrum, dtype)
    values, V = sla.eigs(A, k=3, v0=gaussian(N, dtype=A.dtype))
    expected = EXTREMES["LM"](np.linalg.eigvalsh(D))
    np.testing.assert_allclose(np.sort_complex(values), np.sort(expected), atol=rounding(A, D))
    np.testing.assert_allclose(D @ V, V * values, rtol=0, atol=rounding(A, D))


SIGMA = 2.5  # between two eigenvalues, 0.14 from the next
TRANSFORMS = {
    "normal": lambda w: 1 / (w - SIGMA),
    "buckling": lambda w: w / (w - SIGMA),
    "cayley": lambda w: (w + SIGMA) / (w - SIGMA),
}


@precisions
@pytest.mark.parametrize("mode", TRANSFORMS)
def test_eigsh_with_an_inverse_finds_the_eigenpairs_nearest_to_sigma(mode, dtype):
    A, D = problem("definite", dtype)
    inverse = adapter(np.linalg.inv(D - SIGMA * np.eye(N)), dtype)
    values, V = sla.eigsh(
        A, k=3, sigma=SIGMA, mode=mode, OPinv=inverse, v0=gaussian(N, dtype=A.dtype)
    )
    w = np.linalg.eigvalsh(D)
    nearest = w[np.argsort(abs(TRANSFORMS[mode](w)))[-3:]]
    inner = D if mode == "buckling" else np.eye(N)
    # The inverse is rounded relative to its norm 1/0.14, and the shift undone relative to ‖D‖.
    assert_eigenpairs(D, values, V, nearest, 7 * rounding(A, D), inner=inner)


@precisions
def test_eigsh_without_an_inverse_solves_for_it(dtype):
    A, D = problem("definite", dtype)
    values, V = sla.eigsh(A, k=3, sigma=0.5, v0=gaussian(N, dtype=A.dtype))
    # Its inner GMRES stops at √n u; the solution is off by the condition 19 of D - I/2 as much.
    assert_eigenpairs(D, values, V, np.linalg.eigvalsh(D)[:3], 19 * N**0.5 * rounding(A, D))


@precisions
@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
def test_eigsh_solves_the_generalized_problem(which, dtype):
    A, D = problem("indefinite", dtype)
    M, B = problem("definite", dtype, seed=1)
    Minv = adapter(np.linalg.inv(B), dtype)
    values, V = sla.eigsh(A, k=3, M=M, Minv=Minv, which=which, v0=gaussian(N, dtype=A.dtype))
    w = scipy.linalg.eigh(D, B, eigvals_only=True)
    # Both the inverse and the M-norm bring in the condition 10 of M.
    assert_eigenpairs(D, values, V, EXTREMES[which](w), 10 * rounding(A, D), M=B)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
def test_eigsh_finds_the_eigenpairs_of_a_hermitian_matrix(which, dtype):
    Q, _ = np.linalg.qr(gaussian(N, N) + 1j * gaussian(N, N, seed=1))
    H = (Q * SPECTRA["indefinite"].numpy()) @ Q.conj().T
    A = adapter((H + H.conj().T) / 2, dtype)
    D = A.operator.matrix.to(torch.complex128).numpy()
    values, V = sla.eigsh(A, k=3, which=which, v0=gaussian(N, dtype=A.dtype))
    assert_eigenpairs(D, values, V, EXTREMES[which](np.linalg.eigvalsh(D)), rounding(A, D))


@precisions
def test_eigs_with_a_complex_shift_finds_the_nearest_eigenvalues(dtype):
    A, D = problem("indefinite", dtype)
    sigma = 2.0 + 1.0j
    real_part = np.linalg.inv(D - sigma * np.eye(N)).real  # symmetric, as D is
    inverse = adapter((real_part + real_part.T) / 2, dtype)
    v0 = gaussian(N, dtype=A.dtype)
    values, V = sla.eigs(A, k=2, sigma=sigma, OPinv=inverse, OPpart="r", v0=v0)
    w = np.linalg.eigvalsh(D)
    parts = (1 / (w - sigma)).real
    largest = w[np.argsort(abs(parts))[-2:]]
    np.testing.assert_allclose(np.sort_complex(values), np.sort(largest), atol=rounding(A, D))
    np.testing.assert_allclose(D @ V, V * values, rtol=0, atol=rounding(A, D))


def test_multiple_of_a_float32_adapter_costs_eigsh_no_more_than_the_adapter():
    # Told float64, ARPACK would chase digits that float32 products do not have, and not return.
    A, D = problem("indefinite", torch.float32)
    twice, v0 = 2.0 * A, gaussian(N, dtype=np.float32)
    sla.eigsh(A, k=2, which="SA", v0=v0)
    values, V = sla.eigsh(twice, k=2, which="SA", v0=v0)
    assert_eigenpairs(2 * D, values, V, 2 * np.linalg.eigvalsh(D)[:2], rounding(A, 2 * D))
    assert values.dtype == np.float32
    assert twice.matvecs < 1.5 * A.matvecs  # alike, up to rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eigsh_of_a_half_precision_operator_is_right_to_its_precision(dtype):
    A, D = problem("low rank", dtype)
    value = sla.eigsh(A, k=1, tol=1e-2, v0=gaussian(N), return_eigenvectors=False)
    # A product is rounded on the way in and on the way out, and ARPACK stops at 1%.
    assert value.dtype == np.float32
    assert abs(value[0] / np.linalg.eigvalsh(D)[-1] - 1) < 0.01 + 2 * torch.finfo(dtype).eps


def test_eigsh_of_a_hessian_finds_the_eigenpairs_of_the_dense_hessian():
    p = mlp()
    A = as_linear_operator(HessianOperator(p.model, p.batches, p.loss_fn))
    H = dense_hessian(p.full_loss, p.parameters).numpy()
    values, V = sla.eigsh(A, k=3, which="LM", v0=gaussian(len(H)))
    assert_eigenpairs(H, values, V, EXTREMES["LM"](np.linalg.eigvalsh(H)), rounding(A, H))


# Three vectors and their residuals use up the range of a matrix of rank five, and then SciPy's
# LOBPCG breaks down, with a dense matrix too.
BLOCKS = [
    ("definite", 1),
    ("definite", 3),
    ("indefinite", 1),
    ("indefinite", 3),
    ("identity", 1),
    ("identity", 3),
    ("low rank", 1),
]


@kinds
@precisions
@pytest.mark.parametrize(("spectrum", "k"), BLOCKS)
@pytest.mark.parametrize("largest", [True, False])
def test_lobpcg_finds_the_extreme_eigenpairs(largest, k, spectrum, dtype, kind):
    A, D = problem(spectrum, dtype, kind)
    tol = 40 * np.finfo(A.dtype).eps ** 0.5  # of the residual, and (Weyl) of the eigenvalues
    X = gaussian(N, k, dtype=A.dtype)
    values, V = sla.lobpcg(A, X, tol=tol, maxiter=200, largest=largest)
    w = np.linalg.eigvalsh(D)
    assert_eigenpairs(D, values, V, w[-k:] if largest else w[:k], 2 * tol)


@precisions
@pytest.mark.parametrize("k", [1, 3])
def test_preconditioned_lobpcg_solves_the_generalized_problem(k, dtype):
    A, D = problem("definite", dtype)
    B, B_dense = problem("definite", dtype, seed=1)
    M = adapter(np.linalg.inv(D), dtype)
    tol = 40 * np.finfo(A.dtype).eps ** 0.5
    X = gaussian(N, k, dtype=A.dtype)
    values, V = sla.lobpcg(A, X, B=B, M=M, tol=tol, maxiter=200, largest=False)
    expected = scipy.linalg.eigh(D, B_dense, eigvals_only=True)[:k]
    assert_eigenpairs(D, values, V, expected, 2 * tol, M=B_dense)


@precisions
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_lobpcg_with_a_large_block_is_dense(spectrum, dtype):
    A, D = problem(spectrum, dtype)
    k = N // 5 + 1
    with pytest.warns(UserWarning, match="dense eigensolver"):
        values, V = sla.lobpcg(A, gaussian(N, k, dtype=A.dtype))
    assert_eigenpairs(D, values, V, np.linalg.eigvalsh(D)[-k:], rounding(A, D))
    assert A.matmats == 1


# Left out: PROPACK on the identity and LOBPCG on low rank, which fail with a dense matrix too.
SINGULAR_VALUES = [
    ("arpack", "definite"),
    ("arpack", "indefinite"),
    ("arpack", "identity"),
    ("arpack", "low rank"),
    ("lobpcg", "definite"),
    ("lobpcg", "indefinite"),
    ("lobpcg", "identity"),
    ("propack", "definite"),
    ("propack", "indefinite"),
    ("propack", "low rank"),
]


@kinds
@precisions
@pytest.mark.parametrize(("solver", "spectrum"), SINGULAR_VALUES)
def test_svds_finds_the_largest_singular_triplets(solver, spectrum, dtype, kind):
    A, D = problem(spectrum, dtype, kind)
    precision = np.finfo(A.dtype).eps ** 0.5  # half the digits
    tol = 5 * precision**0.5 if solver == "lobpcg" else precision  # SciPy squares that of LOBPCG
    U, s, Vt = sla.svds(A, k=3, solver=solver, tol=tol, maxiter=300, **SEED)
    norm = np.linalg.norm(D, 2)
    np.testing.assert_allclose(
        np.sort(s), np.linalg.svd(D, compute_uv=False)[2::-1], rtol=0, atol=2 * precision * norm
    )
    # A singular vector is off by the square root of what its singular value is off.
    np.testing.assert_allclose(D @ Vt.T, U * s, rtol=0, atol=2 * precision**0.5 * norm)


@precisions
def test_svds_of_a_wide_composite_finds_its_singular_values(dtype):
    A, D = problem("definite", dtype)
    R = gaussian(N // 2, N, dtype=A.dtype)
    s = sla.svds(sla.aslinearoperator(R) @ A, k=3, **SEED, return_singular_vectors=False)
    expected = np.linalg.svd(R.astype(float) @ D, compute_uv=False)[:3]
    # ARPACK sees the squares σ², rounded relative to the largest of them.
    np.testing.assert_allclose(np.sort(s)[::-1], expected, rtol=rounding(A, D))


RTOL = {torch.float32: 1e-5, torch.float64: 1e-10}
KRYLOV = {
    "cg": sla.cg,
    "cgs": sla.cgs,
    "bicg": sla.bicg,
    "bicgstab": sla.bicgstab,
    "gmres": sla.gmres,
    "lgmres": partial(sla.lgmres, atol=0.0),  # SciPy 1.13 warns without
    "gcrotmk": partial(sla.gcrotmk, atol=0.0),
    "qmr": sla.qmr,
    "tfqmr": partial(sla.tfqmr, atol=0.0),
    "minres": sla.minres,
}
FOR_INDEFINITE = ["gmres", "lgmres", "gcrotmk", "minres"]
SYSTEMS = [
    *[(solver, spectrum) for solver in KRYLOV for spectrum in ("definite", "identity", "low rank")],
    *[(solver, "indefinite") for solver in FOR_INDEFINITE],
]


def right_hand_side(D, dtype):
    """b in the range of D, and the solution of least norm."""
    b = (D @ gaussian(len(D))).astype(dtype)
    return b, np.linalg.pinv(D, rtol=1e-4) @ b.astype(float)


def condition(D):
    s = np.linalg.svd(D, compute_uv=False)
    return s[0] / s[s > 1e-4 * s[0]][-1]


# MINRES stops at ‖r‖ ≤ rtol ‖D‖ ‖x‖ with the Frobenius norm, up to √n times the 2-norm; the
# others at ‖r‖ ≤ rtol ‖b‖.
SLACK = {solver: N**0.5 if solver == "minres" else 1 for solver in KRYLOV}


def assert_solves(x, solution, D, rtol):
    """Relative error at most κ(D) rtol, where rtol bounds the relative residual (twice)."""
    bound = 2 * condition(D) * rtol * np.linalg.norm(solution)
    assert np.linalg.norm(x - solution) <= bound


@kinds
@precisions
@pytest.mark.parametrize(("solver", "spectrum"), SYSTEMS)
def test_krylov_solver_solves(solver, spectrum, dtype, kind):
    A, D = problem(spectrum, dtype, kind)
    b, solution = right_hand_side(D, A.dtype)
    x, info = KRYLOV[solver](A, b, rtol=RTOL[dtype])
    assert info == 0
    assert_solves(x, solution, D, SLACK[solver] * RTOL[dtype])


@precisions
@pytest.mark.parametrize("solver", [name for name in KRYLOV if name != "qmr"])
def test_preconditioned_krylov_solver_solves(solver, dtype):
    A, D = problem("definite", dtype)
    w, Q = np.linalg.eigh(D)
    M = adapter((Q * w**-0.5) @ Q.T, dtype)
    b, solution = right_hand_side(D, A.dtype)
    x, info = KRYLOV[solver](A, b, rtol=RTOL[dtype], M=M)
    assert info == 0
    # Some solvers measure the residual in the norm of M, of condition √10.
    assert_solves(x, solution, D, SLACK[solver] * 10**0.5 * RTOL[dtype])
    assert M.matvecs > 0


@pytest.mark.parametrize("solver", KRYLOV)
@pytest.mark.parametrize(
    ("dtype", "given"), [(torch.float32, np.float64), (torch.float64, np.float32)]
)
def test_krylov_solver_solves_in_two_precisions(solver, dtype, given):
    A, D = problem("definite", dtype)
    b, solution = right_hand_side(D, given)
    x, info = KRYLOV[solver](A, b, rtol=1e-5)
    assert info == 0
    assert_solves(x, solution, D, SLACK[solver] * 1e-5)


def test_minres_solves_with_a_shift():
    A, D = problem("definite", torch.float64)
    b, _ = right_hand_side(D, A.dtype)
    x, info = sla.minres(A, b, shift=0.5, rtol=1e-10)
    assert info == 0
    shifted = D - 0.5 * np.eye(N)
    assert_solves(x, np.linalg.solve(shifted, b), shifted, SLACK["minres"] * 1e-10)


@kinds
@precisions
@pytest.mark.parametrize("spectrum", ["definite", "identity", "low rank"])
@pytest.mark.parametrize("solver", [sla.lsmr, sla.lsqr])
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # lsmr's 1e100
def test_least_squares_solver_solves(solver, spectrum, dtype, kind):
    A, D = problem(spectrum, dtype, kind)
    b, solution = right_hand_side(D, A.dtype)
    rtol = RTOL[dtype]
    maxiter = {"iter_lim" if solver is sla.lsqr else "maxiter": 10 * N}
    x = solver(A, b, atol=rtol, btol=rtol, **maxiter)[0]
    # Both stop at ‖r‖ ≤ rtol (‖b‖ + ‖D‖ ‖x‖) with the Frobenius norm, up to √n times the 2-norm.
    assert_solves(x, solution, D, (1 + N**0.5) * rtol)


@precisions
@pytest.mark.parametrize("solver", [sla.lsmr, sla.lsqr])
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_damped_least_squares_solver_solves_the_regularized_problem(solver, dtype):
    A, D = problem("indefinite", dtype)
    b, _ = right_hand_side(D, A.dtype)
    maxiter = {"iter_lim" if solver is sla.lsqr else "maxiter": 10 * N}
    x = solver(A, b, damp=1.0, atol=RTOL[dtype], btol=RTOL[dtype], **maxiter)[0]
    stacked = np.vstack([D, np.eye(N)])  # of condition √(1 + 10²)
    solution = np.linalg.lstsq(stacked, np.r_[b, np.zeros(N)])[0]
    assert_solves(x, solution, stacked, (1 + N**0.5) * RTOL[dtype])


@kinds
@precisions
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_onenormest_returns_a_column_sum_attained_by_its_vectors(spectrum, dtype, kind):
    A, D = problem(spectrum, dtype, kind)
    np.random.seed(0)  # onenormest draws from the global generator
    estimate, v, w = sla.onenormest(A, compute_v=True, compute_w=True)
    columns = abs(D).sum(axis=0)
    np.testing.assert_allclose(w, D @ v, rtol=0, atol=rounding(A, D))
    np.testing.assert_allclose(estimate, columns[v.argmax()], rtol=rounding(A, D))
    assert abs(v).sum() == 1


@precisions
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_onenormest_with_every_column_is_the_one_norm(spectrum, dtype):
    A, D = problem(spectrum, dtype)
    np.testing.assert_allclose(sla.onenormest(A, t=N), np.linalg.norm(D, 1), rtol=rounding(A, D))


def exponential_tolerance(A, D):
    """Relative error n u ‖D‖ of exp(D) b, as exp has relative condition ‖D‖ for symmetric D."""
    return len(D) * np.finfo(A.dtype).eps * max(np.linalg.norm(D, 2), 1)


def assert_relatively_close(x, y, tolerance):
    assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y)


@kinds
@precisions
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(N,), (N, 3)], ids=["vector", "block"])
def test_expm_multiply_is_the_exponential_times(shape, spectrum, dtype, kind):
    A, D = problem(spectrum, dtype, kind)
    B = gaussian(*shape, dtype=A.dtype)
    Y = sla.expm_multiply(A, B, traceA=np.trace(D))
    assert_relatively_close(Y, scipy.linalg.expm(D) @ B, exponential_tolerance(A, D))


@precisions
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_expm_multiply_on_an_interval_is_the_exponential_at_each_time(spectrum, dtype):
    A, D = problem(spectrum, dtype)
    b = gaussian(N, dtype=A.dtype)
    Y = sla.expm_multiply(A, b, start=0, stop=1, num=5, traceA=np.trace(D))
    expected = np.stack([scipy.linalg.expm(t * D) @ b for t in np.linspace(0, 1, 5)])
    assert_relatively_close(Y, expected, 4 * exponential_tolerance(A, D))  # in four steps


@pytest.mark.skipif(not hasattr(sla, "funm_multiply_krylov"), reason="from SciPy 1.15 on")
@kinds
@precisions
@pytest.mark.parametrize("spectrum", ["definite", "indefinite", "low rank"])
@pytest.mark.parametrize("assume", ["hermitian", "general"])
def test_funm_multiply_krylov_is_the_function_times(assume, spectrum, dtype, kind):
    A, D = problem(spectrum, dtype, kind)
    b = gaussian(N, dtype=A.dtype)
    y = sla.funm_multiply_krylov(scipy.linalg.expm, A, b, assume_a=assume)
    assert_relatively_close(y, scipy.linalg.expm(D) @ b, exponential_tolerance(A, D))


@kinds
@precisions
def test_trust_constr_with_an_adapter_as_hessian_minimizes_a_quadratic(dtype, kind):
    A, D = problem("definite", dtype, kind)
    b = gaussian(N)
    result = scipy.optimize.minimize(
        lambda x: x @ D @ x / 2 - b @ x,
        np.zeros(N),
        jac=lambda x: D @ x - b,
        hess=lambda x: A,
        method="trust-constr",
        options={"gtol": 1e-8},
    )
    # ‖D x - b‖∞ ≤ gtol, and ‖D⁻¹‖ = 1.
    np.testing.assert_allclose(result.x, np.linalg.solve(D, b), rtol=0, atol=1e-8 * N**0.5)


@precisions
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_lsq_linear_finds_the_nonnegative_least_squares_solution(dtype):
    A, D = problem("definite", dtype)
    b = gaussian(N)
    tol = RTOL[dtype]
    result = scipy.optimize.lsq_linear(A, b, (0, np.inf), tol=tol, lsq_solver="lsmr", lsmr_tol=tol)
    x, _ = scipy.optimize.nnls(D, b)
    # First-order optimality up to tol, relative to the cost; D² has condition 100.
    np.testing.assert_allclose(result.x, x, rtol=0, atol=100 * tol * np.linalg.norm(b))
    assert (x == 0).any()  # a bound is active


@takes_rng
@kinds
def test_interpolative_svd_of_low_rank_is_exact(kind):
    A, D = problem("low rank", torch.float64, kind)  # SciPy takes float64 alone
    U, s, V = interpolative.svd(A, 5, rng=0)
    tolerance = 10 * rounding(A, D)  # five columns of D, far from orthogonal, stand for all
    np.testing.assert_allclose(s, [5, 4, 3, 2, 1], rtol=0, atol=tolerance)
    np.testing.assert_allclose((U * s) @ V.conj().T, D, rtol=0, atol=tolerance)


@takes_rng
@pytest.mark.parametrize("spectrum", ["identity", "low rank"])
def test_interpolative_norm_estimate_is_the_spectral_norm(spectrum):
    A, D = problem(spectrum, torch.float64)
    estimate = interpolative.estimate_spectral_norm(A, its=100, rng=0)
    np.testing.assert_allclose(estimate, np.linalg.norm(D, 2), rtol=rounding(A, D))
