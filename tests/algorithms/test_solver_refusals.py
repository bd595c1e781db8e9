"""What cannot be answered is refused: bad options before any product, bad products by name."""

import functools
import math

import pytest
import torch

from torchlinop import (
    CountingOperator,
    LambdaOperator,
    MatrixOperator,
    apply_function,
    block_coupling,
    condition_number,
    conjugate_gradient,
    deflated_power_iteration,
    diagonal,
    extremal_eigenvalues,
    hutchinson,
    inverse,
    lanczos,
    lanczos_algorithm,
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
    xtrace,
)
from torchlinop.algorithms import eigen_request
from torchlinop.errors import (
    MemoryEstimateError,
    NonFiniteError,
    NotConvergedWarning,
    OptionError,
    PrecisionWarning,
    SymmetryError,
    VectorError,
)
from torchlinop.testing import spectra
from torchlinop.testing.gallery import with_spectrum

N = 60
A = with_spectrum(1 + 9 * spectra.exponential(N, 0.8))[0]
b = torch.ones(N, dtype=A.dtype)


def call(algorithm, *arguments, **options):
    return functools.partial(lambda op: algorithm(op, *arguments, **options))


EIGENSOLVERS = {
    "lanczos": call(lanczos, 3),
    "lanczos, blocks": call(lanczos, 3, block_size=3),
    "lobpcg": call(lobpcg, 3),
    "power": call(power_iteration_one),
    "deflated power": call(deflated_power_iteration, 2),
    "randomized": call(randomized_eigh, 3),
    "spectrum": call(lanczos_algorithm),
}
LEAVE_ONE_OUT = {
    "xtrace": call(trace, 24, method="xtrace"),
    "xnystrace": call(trace, 24, method="xnystrace"),
    "xdiag": call(diagonal, 24),
}
SOLVERS = {
    "cg": call(conjugate_gradient, b),
    "minres": call(minres, b),
    "solve": call(solve, b, 0.5),
    "inverse": lambda op: inverse(op, 0.5) @ b,
}
OTHERS = {
    "lanczos, partial": call(lanczos, 3, 30, reorthogonalize="partial"),
    "lanczos, none": call(lanczos, 3, 30, reorthogonalize="none"),
    "tridiagonal": call(lanczos_tridiagonal, b, 20),
    "nystrom": call(nystrom, 10),
    "hutchinson": call(trace, 24, method="hutchinson"),
    "hutch++": call(trace, 24, method="hutch++"),
    "na-hutch++": call(trace, 24, method="na-hutch++"),
    "trace, rtol": call(trace, rtol=0.1),
    "diagonal": call(diagonal, 24, method="hutchinson"),
    "2-norm": call(norm),
    "Frobenius norm": call(norm, "fro", num_matvecs=24),
    "nuclear norm": call(norm, "nuc", num_matvecs=40),
    "extremal": call(extremal_eigenvalues),
    "condition": call(condition_number, 40),
    "slq": call(slq, 4, 14),
    "logdet": call(logdet, num_probes=4, num_steps=14),
    "density": call(spectral_density, 4, 14),
    "function": call(apply_function, torch.exp, b),
}
ALL = EIGENSOLVERS | LEAVE_ONE_OUT | SOLVERS | OTHERS


def table(algorithms):
    return pytest.mark.parametrize("algorithm", algorithms.values(), ids=algorithms.keys())


def of_product(product):
    return LambdaOperator(N, product, matmat=product, dtype=A.dtype)


@table(ALL)
@pytest.mark.parametrize("good", [0, 7])
def test_products_that_hold_nan_are_named(algorithm, good):
    columns = iter(range(10_000))

    def product(V):
        AV = (A @ V).reshape(N, -1)
        for column in AV.unbind(1):
            column[3] *= 1.0 if next(columns) < good else float("nan")
        return AV.reshape(V.shape)

    with pytest.raises(NonFiniteError, match=r"(?s)LambdaOperator.*NaN or infin"):
        algorithm(of_product(product))


def asymmetric(size):
    G = torch.randn(N, N, generator=torch.Generator().manual_seed(5), dtype=A.dtype)
    return MatrixOperator(A + size * (G - G.T))


@table(EIGENSOLVERS)
@pytest.mark.parametrize("size", [0.1, 1e-4])
def test_eigensolvers_name_a_matrix_that_is_not_symmetric(algorithm, size):
    with pytest.raises(SymmetryError, match=r"\|<u,Av>-<v,Au>\| = [1-9].*repeatability 0e\+00"):
        algorithm(asymmetric(size))


@table(EIGENSOLVERS)
@pytest.mark.parametrize("size", [1e-2, 1e-6])
def test_eigensolvers_name_products_that_do_not_repeat(algorithm, size):
    with pytest.raises(SymmetryError, match=r"repeatability [1-9].*look for randomness in it"):
        algorithm(of_product(lambda V: A @ V + size * torch.randn_like(V)))


ANY_SQUARE_MATRIX = {"hutchinson", "hutch++", "na-hutch++", "diagonal", "Frobenius norm"}
SYMMETRIC = {
    name: algorithm
    for name, algorithm in (LEAVE_ONE_OUT | SOLVERS | OTHERS).items()
    if name not in ANY_SQUARE_MATRIX
} | {
    "slq, one probe": call(slq, 1, 14),
    "nuclear norm, exact": call(norm, "nuc", num_matvecs=N),
}


@table(SYMMETRIC)
@pytest.mark.parametrize("size", [0.1, 1e-4, 1e-8])
def test_what_needs_a_symmetric_matrix_names_another(algorithm, size):
    counted = CountingOperator(asymmetric(size))
    with pytest.raises(SymmetryError, match=r"\|<u,Av>-<v,Au>\| = [1-9].*repeatability 0e\+00"):
        algorithm(counted)


@table(SYMMETRIC)
@pytest.mark.parametrize("size", [1e-2, 1e-6])
def test_what_needs_a_fixed_matrix_names_products_that_do_not_repeat(algorithm, size):
    with pytest.raises(SymmetryError, match=r"repeatability [1-9].*look for randomness in it"):
        algorithm(of_product(lambda V: A @ V + size * torch.randn_like(V)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
def test_the_look_for_an_asymmetry_costs_no_product(dtype):
    counted = CountingOperator(MatrixOperator(A.to(dtype)))
    slq(counted, 2, 10)
    extremal_eigenvalues(counted, 10)
    diagonal(counted, 20)
    trace(counted, 20, method="xtrace")
    assert counted.matvecs == 20 + 10 + 20 + 20


@pytest.mark.parametrize(
    ("ask", "truth"),
    [
        (call(trace, 40, method="hutchinson"), torch.trace),
        (call(trace, 40, method="hutch++"), torch.trace),
        (call(trace, 40, method="na-hutch++"), torch.trace),
        (call(trace, 60), torch.trace),
        (call(norm, "fro", num_matvecs=40), torch.linalg.matrix_norm),
    ],
)
def test_identities_of_any_square_matrix_need_no_symmetry(ask, truth):
    op = asymmetric(0.1)
    found = ask(op)
    assert abs(found.estimate - float(truth(op.matrix))) <= 4 * found.stderr + 1e-9


def test_the_diagonal_of_any_square_matrix_is_a_mean_over_probes():
    op = asymmetric(0.1)
    found = diagonal(op, 50, method="hutchinson")
    assert ((found.estimate - op.matrix.diagonal()).abs() <= 4 * found.stderr).all()


@pytest.mark.parametrize("algorithm", [conjugate_gradient, minres])
def test_noise_that_repeats_is_not_claimed_to_be_a_smaller_residual(algorithm):
    def product(V):  # rounded: not quite linear, and the same again
        return (A @ V * 2**10).round() / 2**10

    with pytest.warns(NotConvergedWarning), pytest.warns(PrecisionWarning, match="product noise"):
        algorithm(of_product(product), b / 3, rtol=1e-10)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (call(lanczos, N + 1), "expected k from 1 to n = 60, got 61"),
        (call(lobpcg, N + 1), "expected k from 1 to n = 60, got 61"),
        (call(deflated_power_iteration, N + 1), "expected k from 1 to n = 60, got 61"),
        (call(randomized_eigh, N + 1), "expected k from 1 to n = 60, got 61"),
        (call(nystrom, N + 1), "expected rank from 1 to n = 60, got 61"),
        (call(lanczos, 0), "expected k from 1"),
        (call(lanczos, 5, 4), "expected max_iter, the budget of products, to be at least 5"),
        (call(lobpcg, 5, 0), "max_iter"),
        (call(deflated_power_iteration, 2, 0), "max_iter"),
        (call(power_iteration_one, 0), "max_iter"),
        (call(lanczos, which="largest"), "unknown which 'largest'; choose one of LM, LA, SA, BE"),
        (call(lobpcg, which="LM"), "unknown which 'LM'; choose"),
        (call(lanczos, tol=-1e-6), "expected tol from 0 to 1"),
        (call(lobpcg, tol=-1e-6), "expected tol"),
        (call(power_iteration_one, tol=-1e-6), "expected tol"),
        (call(randomized_eigh, tol=-1e-6), "expected tol"),
        (call(conjugate_gradient, b, rtol=-1.0), "rtol"),
        (call(minres, b, max_iter=0), "max_iter"),
        (call(solve, b, method="gmres"), "unknown method 'gmres'"),
        (call(trace, 24, method="girard"), "unknown method 'girard'"),
        (call(trace, 24, distribution="uniform"), "unknown distribution 'uniform'"),
        (call(trace, 0), "num_matvecs"),
        (call(trace, rtol=-0.1), "rtol"),
        (call(diagonal, 24, method="diag++"), "unknown method"),
        (call(norm, "inf"), "unknown"),
        (call(slq, 0), "probe"),
        (call(slq, 4, 0), "step"),
        (call(spectral_density, 4, 10, sigma=-1.0), "sigma"),
        (call(apply_function, torch.exp, b, 0), "steps"),
        (call(lanczos, max_seconds=0.0), "max_seconds"),
        (call(spectral_density, 4, 10, 99.5), "expected num_grid_points to be an integer"),
        (call(inverse, rtol=-1.0), "expected rtol between 0 and 1"),
        (call(inverse, max_iter=0), "max_iter at least 1"),
    ],
)
def test_options_are_refused_before_any_product(ask, message):
    counted = CountingOperator(MatrixOperator(A))
    with pytest.raises(OptionError, match=message):
        ask(counted)
    assert counted.matvecs == 0


@table(ALL)
def test_a_matrix_is_no_operator(algorithm):
    with pytest.raises(OptionError, match="to be a CurvatureOperator, got Tensor; pass MatrixOp"):
        algorithm(A)


SEEDED = {
    "trace": trace,
    "diagonal": diagonal,
    "norm": norm,
    "nuclear norm": functools.partial(norm, ord="nuc"),
    "extremal": extremal_eigenvalues,
    "condition": condition_number,
    "slq": slq,
    "logdet": logdet,
    "density": spectral_density,
    "nystrom": nystrom,
    "coupling": block_coupling,
}


@table(SEEDED)
@pytest.mark.parametrize("seed", [-1, 0.5, None])
def test_what_is_no_seed_is_refused_before_any_product(algorithm, seed):
    counted = CountingOperator(MatrixOperator(A))
    with pytest.raises(OptionError, match="expected seed to be an integer from 0 on, got"):
        algorithm(counted, seed=seed)
    assert counted.matvecs == 0


@pytest.mark.parametrize(
    "ask",
    [
        call(lanczos, v0=torch.ones(3, dtype=A.dtype)),
        call(lobpcg, v0=torch.ones(3, dtype=A.dtype)),
        call(power_iteration_one, v0=torch.ones(3, dtype=A.dtype)),
        call(lanczos_tridiagonal, torch.ones(3, dtype=A.dtype), 5),
        call(conjugate_gradient, torch.ones(3, dtype=A.dtype)),
        call(minres, torch.ones(3, dtype=A.dtype)),
        call(solve, torch.ones(3, dtype=A.dtype)),
        call(apply_function, torch.exp, torch.ones(3, dtype=A.dtype)),
    ],
)
def test_vectors_of_another_space_are_refused_before_any_product(ask):
    counted = CountingOperator(MatrixOperator(A))
    with pytest.raises(VectorError, match="expected"):
        ask(counted)
    assert counted.matvecs == 0


def test_a_basis_that_does_not_fit_is_refused_before_any_product(monkeypatch):
    monkeypatch.setattr(eigen_request, "free_bytes", lambda device: 10_000)
    counted = CountingOperator(MatrixOperator(A))
    with pytest.raises(MemoryEstimateError, match=r"vectors x 60 x 8 B.*Try"):
        lanczos(counted)
    assert counted.matvecs == 0


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            call(hutchinson, num_samples=8),
            "unknown option 'num_samples'; did you mean one of num_m",
        ),
        (call(xtrace, method="xtrace"), "unknown option 'method'"),
        (call(inverse, typo=1), "unknown option 'typo'"),
        (call(conjugate_gradient, b, maxiter=5), "unknown option 'maxiter'.*max_iter"),
        (call(minres, b, tol=1e-3), "unknown option 'tol'.*rtol"),
        (call(condition_number, 20, steps=5), "unknown option 'steps'"),
        (call(spectral_density, num_probes=5), "unknown option 'num_probes'"),
        (call(logdet, lanczos_steps=5), "unknown option 'lanczos_steps'"),
        (call(inverse, max_seconds=0), "expected max_seconds to be positive, got 0"),
        (call(inverse, math.nan), "expected a finite damping, got nan"),
        (call(apply_function, "exp", b), "expected f to be a function of a tensor, got 'exp'"),
        (call(lanczos, 2, callback=3), "expected callback to be a function of three arguments"),
        (call(lanczos, 2, checkpoint=3), "expected checkpoint to be a path, got 3; pass"),
        (call(lanczos, 2, basis_dtype="fp16"), "basis_dtype to be a torch.dtype, got 'fp16'; take"),
        (
            call(lanczos, 2, basis_device="here"),
            "expected basis_device to be a device that is here",
        ),
        (call(lanczos, 2, block_size=True), 'block_size to be at least 1, or "auto", got True'),
        (call(lanczos, 2, which=3), "unknown which 3; choose one of"),
        (call(norm, [1, 2]), "unknown ord"),
        (call(spectral_density, sigma=True), "expected sigma to be a positive number"),
        (call(lobpcg, 2, preconditioner=A), "preconditioner to be a CurvatureOperator, got Tensor"),
        (
            call(solve, b, preconditioner="kfac"),
            "preconditioner to be a CurvatureOperator, got str",
        ),
        (call(lanczos_algorithm, "config"), "expected config to be a LanczosConfig, got 'config'"),
    ],
)
def test_what_is_no_such_thing_is_refused_before_any_product(ask, message):
    counted = CountingOperator(MatrixOperator(A))
    with pytest.raises(OptionError, match=message):
        ask(counted)
    assert counted.matvecs == 0


def test_stochastic_power_iteration_is_of_operators():
    with pytest.raises(OptionError, match="the operator of step 0 to be a CurvatureOperator, got"):
        stochastic_power_iteration([A])
    with pytest.raises(OptionError, match="expected operators to be a list, or a function"):
        stochastic_power_iteration(MatrixOperator(A))


@pytest.mark.parametrize(
    "ask",
    [
        call(lanczos, 2, v0=[1.0]),
        call(lobpcg, 2, v0=3),
        call(power_iteration_one, v0="start"),
        call(lanczos_tridiagonal, [1.0], 5),
        call(conjugate_gradient, [1.0]),
        call(minres, None),
        call(apply_function, torch.exp, 3.0),
    ],
)
def test_what_is_no_tensor_is_refused_as_a_vector(ask):
    counted = CountingOperator(MatrixOperator(A))
    with pytest.raises(
        VectorError, match=r"expected (b|v0) to be a tensor.*; pass torch.as_tensor"
    ):
        ask(counted)
    assert counted.matvecs == 0


def test_a_block_without_columns_is_refused_by_name():
    with pytest.raises(VectorError, match="at least one column"):
        apply_function(MatrixOperator(A), torch.exp, b[:, None][:, :0])
