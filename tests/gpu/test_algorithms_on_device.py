"""Every algorithm on the device, in every precision, against what NumPy finds on the CPU."""

import numpy as np
import pytest
import torch
from on_device import DEVICE, anywhere, moved

from torchlinop import (
    HessianOperator,
    LanczosConfig,
    MatrixOperator,
    apply_function,
    block_coupling,
    compute_spectrum,
    condition_number,
    conjugate_gradient,
    deflated_power_iteration,
    diagonal,
    extremal_eigenvalues,
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
    stochastic_power_iteration,
    trace,
)
from torchlinop.testing import gallery
from torchlinop.testing.oracles import dense_hessian

pytestmark = anywhere

N = 40
SPECTRUM = np.concatenate([[10, 8, 6, 4], np.linspace(2, 0.5, N - 4)])
float64, float32, bfloat16 = torch.float64, torch.float32, torch.bfloat16
DTYPES = [float64, float32, bfloat16, torch.complex128]
REAL = DTYPES[:3]
# Of eigenvalues, to the norm of 10: tol², and the rounding of products. Of vectors: the tolerance
# of the residual, √eps, times the condition number of 20; that of bfloat16 products likewise.
EIGENVALUES = {float64: 1e-8, torch.complex128: 1e-8, float32: 1e-4, bfloat16: 0.1}
VECTORS = {float64: 4e-7, torch.complex128: 4e-7, float32: 8e-3, bfloat16: 0.2}


def on_device(dtype, scale=1.0):
    """A matrix of this spectrum as an operator, and what rounding left of it as an array."""
    rng = np.random.default_rng(0)
    G = rng.standard_normal((N, N)) + 1j * rng.standard_normal((N, N)) * dtype.is_complex
    Q, _ = np.linalg.qr(G)
    A = torch.from_numpy((Q * (scale * SPECTRUM)) @ Q.conj().T)
    A = (A if dtype.is_complex else A.real).to(dtype)
    return MatrixOperator(A.to(DEVICE)), array(A)


def array(t):
    return t.cpu().to(torch.promote_types(t.dtype, float64)).numpy()


def eigenvalues(algorithm, **options):
    return lambda op: algorithm(op, **options).eigenvalues


def of_tridiagonal(op):
    T = lanczos_tridiagonal(op, op.space.random(1, seed=3)[:, 0], N)
    return torch.linalg.eigvalsh(T.matrix()).flip(0)[:3]


EXTREMES = {
    "lanczos": (eigenvalues(lanczos, k=3), [0, 1, 2]),
    "lanczos, smallest": (eigenvalues(lanczos, k=2, which="SA", ncv=30), [-1, -2]),
    "lanczos, block": (eigenvalues(lanczos, k=3, which="LA", block_size=3), [0, 1, 2]),
    "lanczos, partial": (eigenvalues(lanczos, k=3, reorthogonalize="partial"), [0, 1, 2]),
    "lanczos, local": (eigenvalues(lanczos, k=1, reorthogonalize="local", max_iter=16), [0]),
    "lobpcg": (eigenvalues(lobpcg, k=3), [0, 1, 2]),
    "power iteration": (eigenvalues(power_iteration_one), [0]),
    "deflated power iteration": (eigenvalues(deflated_power_iteration, k=2), [0, 1]),
    "randomized": (eigenvalues(randomized_eigh, k=3, oversampling=N - 3), [0, 1, 2]),
    "tridiagonal": (of_tridiagonal, [0, 1, 2]),
    "extremal": (lambda op: torch.tensor(tuple(extremal_eigenvalues(op, N))), [-1, 0]),
    "norm": (lambda op: torch.tensor([float(norm(op, 2, num_matvecs=N))]), [0]),
}


@pytest.mark.parametrize("question", EXTREMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore::torchlinop.TorchlinopWarning")
def test_extreme_eigenvalues_are_those_of_numpy(question, dtype):
    ask, answer = EXTREMES[question]
    op, A = on_device(dtype)
    exact = np.linalg.eigvalsh(A)[::-1][answer]
    found = array(ask(op).double())
    np.testing.assert_allclose(np.sort(found), np.sort(exact), rtol=0, atol=EIGENVALUES[dtype])


@pytest.mark.parametrize("dtype", REAL)
def test_nystrom_finds_the_largest_eigenvalues(dtype):
    op, A = on_device(dtype)
    found = array(nystrom(op, N, shift=0.0).eigenvalues.double())[:3]
    exact = np.linalg.eigvalsh(A)[::-1][:3]
    np.testing.assert_allclose(found, exact, rtol=0, atol=EIGENVALUES[dtype])


@pytest.mark.parametrize("dtype", [float64, float32, torch.complex128])
@pytest.mark.parametrize("solver", [lanczos, lobpcg])
def test_eigenvectors_lie_on_the_device_and_have_the_residuals_they_claim(solver, dtype):
    op, A = on_device(dtype)
    found = solver(op, 3)
    assert found.eigenvectors.device == DEVICE
    X = array(found.eigenvectors)
    residuals = np.linalg.norm(A @ X - X * array(found.eigenvalues), axis=0)
    np.testing.assert_allclose(
        residuals, array(found.residual_norms), rtol=0, atol=EIGENVALUES[dtype]
    )


SOLVES = {
    "cg": (lambda op, b: conjugate_gradient(op, b).x, lambda t: 1 / t),
    "minres": (lambda op, b: minres(op, b).x, lambda t: 1 / t),
    "minres, indefinite": (lambda op, b: minres(op, b, damping=-3.0).x, lambda t: 1 / (t - 3)),
    "solve": (lambda op, b: solve(op, b, 0.5, method="cg").x, lambda t: 1 / (t + 0.5)),
    "inverse": (lambda op, b: inverse(op, 0.5) @ b, lambda t: 1 / (t + 0.5)),
    "exp": (lambda op, b: apply_function(op, torch.exp, b).x, np.exp),
}


@pytest.mark.parametrize("question", SOLVES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore::torchlinop.errors.NotConvergedWarning")  # bfloat16
def test_functions_of_a_matrix_are_those_of_numpy(question, dtype):
    ask, f = SOLVES[question]
    op, A = on_device(dtype)
    b = op.space.random(1, seed=3)[:, 0]
    values, Q = np.linalg.eigh(A)
    exact = Q @ (f(values) * (Q.conj().T @ array(b)))
    x = ask(op, b)
    assert x.device == DEVICE
    assert np.linalg.norm(array(x) - exact) <= VECTORS[dtype] * np.linalg.norm(exact)


SUMS = {
    "hutchinson": (lambda op: trace(op, 24, method="hutchinson"), lambda t: t),
    "hutch++": (lambda op: trace(op, 24, method="hutch++"), lambda t: t),
    "na-hutch++": (lambda op: trace(op, 24, method="na-hutch++"), lambda t: t),
    "xtrace": (lambda op: trace(op, 24, method="xtrace"), lambda t: t),
    "xnystrace": (lambda op: trace(op, 24, method="xnystrace"), lambda t: t),
    # By the law of probes on a sphere, 4 standard errors of 16 are 0.58 of the sum, of 8 0.82.
    "slq": (lambda op: slq(op, 16, 16).spectral_sum(torch.square), np.square),
    "logdet": (lambda op: logdet(op, num_probes=8, num_steps=16), np.log),
    "density": (
        lambda op: spectral_density(op, 8, 16).quadrature.spectral_sum(torch.sqrt),
        np.sqrt,
    ),
}


@pytest.mark.parametrize("question", SUMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_over_the_spectrum_are_those_of_numpy_within_four_standard_errors(question, dtype):
    ask, f = SUMS[question]
    op, A = on_device(dtype)
    estimate, exact = ask(op), f(np.linalg.eigvalsh(A)).sum()
    value = getattr(estimate, "estimate", None) or estimate.value
    assert abs(float(value) - exact) <= 4 * float(estimate.stderr) < 0.7 * abs(exact)


@pytest.mark.parametrize("dtype", REAL)
def test_norms_and_condition_are_those_of_numpy(dtype):
    op, A = on_device(dtype)
    values = np.linalg.eigvalsh(A)
    rtol = EIGENVALUES[dtype]
    fro, nuc = (float(norm(op, kind, num_matvecs=N)) for kind in ("fro", "nuc"))
    np.testing.assert_allclose(fro, np.linalg.norm(values), rtol=rtol)
    np.testing.assert_allclose(nuc, abs(values).sum(), rtol=rtol)
    condition = condition_number(op.shift(12.0), N).estimate
    np.testing.assert_allclose(condition, (values[-1] + 12) / (values[0] + 12), rtol=VECTORS[dtype])


@pytest.mark.parametrize("dtype", REAL)
def test_entries_of_the_diagonal_are_within_four_standard_errors(dtype):
    op, A = on_device(dtype)
    found = diagonal(op, 30)
    assert found.estimate.device == DEVICE
    error = abs(array(found.estimate) - A.diagonal())
    assert (error <= 4 * array(found.stderr)).mean() > 0.9


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("dtype", [float64, float32])
def test_scale_of_the_matrix_does_not_matter(scale, dtype):
    op, A = on_device(dtype, scale)
    found = array(lanczos(op, 3).eigenvalues)
    np.testing.assert_allclose(found, np.linalg.eigvalsh(A)[::-1][:3], rtol=EIGENVALUES[dtype])


def hessian(dtype=float64):
    """That of the MLP of the gallery on the device, and its dense one, found on the CPU."""
    p = moved(gallery.mlp(), dtype)
    H = HessianOperator(p.model, p.batches, p.loss_fn)
    q = moved(moved(gallery.mlp(), dtype, "cpu"), float64, "cpu")
    return H, dense_hessian(q.full_loss, q.parameters).numpy()


@pytest.mark.parametrize("dtype", [float64, float32])
def test_spectrum_of_a_model_is_that_of_its_dense_hessian(dtype):
    H, D = hessian(dtype)
    found = array(lanczos(H, 4, which="LA").eigenvalues)
    np.testing.assert_allclose(found, np.linalg.eigvalsh(D)[::-1][:4], rtol=EIGENVALUES[dtype])


def test_coupling_of_blocks_is_the_ratio_of_norms_within_five_standard_errors():
    H, D = hessian()
    found = block_coupling(H, num_probes=200)
    ends = np.cumsum([block.size for block in H.blocks().values()])
    for b, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        inside, whole = np.linalg.norm(D[start:end, start:end]), np.linalg.norm(D[start:end])
        error = abs(float(found.cosine[b]) - inside / whole)
        assert error <= 5 * float(found.cosine_stderr[b]) + 1e-12


@pytest.mark.parametrize("dtype", [float64, float32])
def test_power_iteration_of_one_matrix_time_and_again_is_exact(dtype):
    op, A = on_device(dtype)
    found = stochastic_power_iteration([op], 200)
    assert found.eigenvector.device == DEVICE
    exact = np.linalg.eigvalsh(A)[-1]
    np.testing.assert_allclose(found.eigenvalue, exact, rtol=EIGENVALUES[dtype])


def test_spectrum_by_name_is_that_of_the_dense_hessian():
    p, (_, D) = moved(gallery.mlp()), hessian()
    config = LanczosConfig(k=3, tol=1e-8)
    found = compute_spectrum(p.model, p.full_batch, "hessian", config, p.loss_fn)
    exact = np.linalg.eigvalsh(D)
    largest = exact[np.argsort(-abs(exact))][:3]
    np.testing.assert_allclose(array(found.eigenvalues), np.sort(largest)[::-1], rtol=1e-8)
