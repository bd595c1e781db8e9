"""Every algorithm answers for every kind of operator what NumPy finds in the matrix."""

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch

from torchlinop import (
    LambdaOperator,
    MatrixOperator,
    apply_function,
    condition_number,
    conjugate_gradient,
    deflated_power_iteration,
    diagonal,
    extremal_eigenvalues,
    from_linear_operator,
    inverse,
    lanczos,
    lanczos_tridiagonal,
    lobpcg,
    logdet,
    minres,
    norm,
    nystrom,
    power_iteration_one,
    randomized_eigh,
    slq,
    solve,
    spectral_density,
    trace,
)
from torchlinop.errors import OptionError

SPECTRUM = np.concatenate([[10, 8, 6, 4], np.linspace(2, 0.5, 36)])
N = len(SPECTRUM)
float64, float32, bfloat16 = torch.float64, torch.float32, torch.bfloat16


def matrix(dtype):
    """Of this spectrum, as it is when rounded to the dtype."""
    rng = np.random.default_rng(0)
    G = rng.standard_normal((N, N)) + 1j * rng.standard_normal((N, N)) * dtype.is_complex
    Q, _ = np.linalg.qr(G)
    A = torch.from_numpy((Q * SPECTRUM) @ Q.conj().T)
    return (A if dtype.is_complex else A.real).to(dtype)


on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def as_array(A):
    return np.ascontiguousarray(A.numpy())


KINDS = [
    pytest.param(MatrixOperator, float64, id="matrix"),
    pytest.param(lambda A: LambdaOperator(N, lambda v: A @ v, dtype=A.dtype), float64, id="lambda"),
    pytest.param(lambda A: from_linear_operator(as_array(A)), float64, id="array"),
    pytest.param(
        lambda A: from_linear_operator(scipy.sparse.csr_array(as_array(A))), float64, id="sparse"
    ),
    pytest.param(
        lambda A: from_linear_operator(scipy.sparse.linalg.aslinearoperator(as_array(A))),
        float64,
        id="linear operator",
    ),
    pytest.param(MatrixOperator, torch.complex128, id="hermitian"),
    pytest.param(
        lambda A: from_linear_operator(scipy.sparse.csr_array(as_array(A))),
        torch.complex128,
        id="hermitian sparse",
    ),
    pytest.param(MatrixOperator, float32, id="float32"),
    pytest.param(
        lambda A: from_linear_operator(scipy.sparse.csr_array(as_array(A))),
        float32,
        id="float32 sparse",
    ),
    pytest.param(MatrixOperator, bfloat16, id="bfloat16"),
    pytest.param(lambda A: MatrixOperator(A.cuda()), float64, id="cuda", marks=on_a_gpu),
]
# Of eigenvalues, to ‖A‖: tol², and the rounding of products. Of vectors: the tolerance of the
# residual, √eps, times the condition number of 20; that of bfloat16 products, eps / 16, likewise.
EIGENVALUES = {float64: 1e-9, torch.complex128: 1e-9, float32: 1e-5, bfloat16: 1e-2}
VECTORS = {float64: 4e-7, torch.complex128: 4e-7, float32: 8e-3, bfloat16: 0.2}


def largest(algorithm, **options):
    return lambda op: algorithm(op, **options).eigenvalues


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (largest(lanczos, k=3), [0, 1, 2]),
        (largest(lanczos, k=3, which="LA", block_size=3), [0, 1, 2]),
        (largest(lanczos, k=3, reorthogonalize="partial"), [0, 1, 2]),
        (largest(lanczos, k=1, reorthogonalize="local", max_iter=16), [0]),
        (largest(lanczos, k=1, reorthogonalize="none", max_iter=16), [0]),
        (largest(lobpcg, k=3), [0, 1, 2]),
        (largest(power_iteration_one), [0]),
        (largest(deflated_power_iteration, k=2), [0, 1]),
        (largest(randomized_eigh, k=3, oversampling=N - 3), [0, 1, 2]),
        (lambda op: torch.tensor(tuple(extremal_eigenvalues(op, N))), [-1, 0]),
        (lambda op: ritz_values(op)[:3], [0, 1, 2]),
        (lambda op: torch.tensor([float(norm(op, 2, num_matvecs=N))]), [0]),
    ],
)
@pytest.mark.filterwarnings("ignore::torchlinop.errors.OrthogonalityWarning")
def test_eigenvalues_are_those_of_numpy(kind, dtype, question, answer):
    A = matrix(dtype)
    exact = np.linalg.eigvalsh(dense(A))[::-1]
    found = question(kind(A)).double().cpu().numpy()
    np.testing.assert_allclose(found, exact[answer], rtol=0, atol=10 * EIGENVALUES[dtype])


def ritz_values(op):
    T = lanczos_tridiagonal(op, start(op), N)
    return torch.linalg.eigvalsh(T.matrix()).flip(0)


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_nystrom_finds_the_eigenvalues_of_real_operators(kind, dtype):
    if dtype.is_complex:
        with pytest.raises(OptionError, match="expected a real operator"):
            nystrom(kind(matrix(dtype)), N)
        return
    A = matrix(dtype)
    found = nystrom(kind(A), N, shift=0.0).eigenvalues.double().cpu().numpy()[:3]
    exact = np.linalg.eigvalsh(dense(A))[::-1][:3]
    np.testing.assert_allclose(found, exact, rtol=0, atol=10 * EIGENVALUES[dtype])


def dense(A):
    return A.to(torch.promote_types(A.dtype, float64)).numpy()


def start(op):
    return op.space.random(1, seed=3)[:, 0]


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize(
    ("question", "f"),
    [
        (lambda op, b: conjugate_gradient(op, b).x, lambda t: 1 / t),
        (lambda op, b: minres(op, b).x, lambda t: 1 / t),
        (lambda op, b: minres(op, b, damping=-3.0).x, lambda t: 1 / (t - 3)),
        (lambda op, b: solve(op, b, 0.5, method="cg").x, lambda t: 1 / (t + 0.5)),
        (lambda op, b: inverse(op, 0.5) @ b, lambda t: 1 / (t + 0.5)),
        (lambda op, b: apply_function(op, torch.exp, b).x, np.exp),
    ],
    ids=["cg", "minres", "minres indefinite", "solve", "inverse", "exp"],
)
@pytest.mark.filterwarnings("ignore:.*rounding forbids more")  # of exp in bfloat16
def test_functions_of_a_matrix_are_those_of_numpy(kind, dtype, question, f):
    A = matrix(dtype)
    op = kind(A)
    b = start(op)
    values, Q = np.linalg.eigh(dense(A))
    exact = Q @ (f(values) * (Q.conj().T @ dense(b.cpu())))
    error = np.linalg.norm(dense(question(op, b).cpu()) - exact)
    assert error <= VECTORS[dtype] * np.linalg.norm(exact)


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize(
    ("question", "f"),
    [
        (lambda op: trace(op, 24, method="hutchinson"), lambda t: t),
        (lambda op: trace(op, 24, method="hutch++"), lambda t: t),
        (lambda op: trace(op, 24, method="na-hutch++"), lambda t: t),
        (lambda op: trace(op, 24, method="xtrace"), lambda t: t),
        (lambda op: trace(op, 24, method="xnystrace"), lambda t: t),
        (lambda op: slq(op, 16, 16).spectral_sum(torch.square), np.square),  # 4 s.e.: 0.58 of it
        (lambda op: logdet(op, num_probes=8, num_steps=16), np.log),
        (lambda op: spectral_density(op, 8, 16).quadrature.spectral_sum(torch.sqrt), np.sqrt),
    ],
    ids=["hutchinson", "hutch++", "na-hutch++", "xtrace", "xnystrace", "slq", "logdet", "density"],
)
def test_traces_are_those_of_numpy_within_four_standard_errors(kind, dtype, question, f):
    A = matrix(dtype)
    estimate = question(kind(A))
    exact = f(np.linalg.eigvalsh(dense(A))).sum()
    value = getattr(estimate, "estimate", None) or estimate.value
    assert abs(float(value) - exact) <= 4 * float(estimate.stderr) < 0.7 * abs(exact)


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_norms_and_diagonals_are_those_of_numpy(kind, dtype):
    A = matrix(dtype)
    op = kind(A)
    tolerance = {"rtol": 10 * EIGENVALUES[dtype]}
    values = np.linalg.eigvalsh(dense(A))
    np.testing.assert_allclose(
        float(norm(op, "fro", num_matvecs=N)), np.linalg.norm(values), **tolerance
    )
    np.testing.assert_allclose(float(norm(op, "nuc", num_matvecs=N)), values.sum(), **tolerance)
    np.testing.assert_allclose(trace(op, N).estimate, values.sum(), **tolerance)
    condition = condition_number(op.shift(12.0), N).estimate
    np.testing.assert_allclose(condition, (values[-1] + 12) / (values[0] + 12), rtol=VECTORS[dtype])
    entries = diagonal(op, 30)
    error = (entries.estimate.double().cpu() - A.diagonal().real.double()).abs()
    assert (error <= 4 * entries.stderr.cpu()).double().mean() > 0.9
