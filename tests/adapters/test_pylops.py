"""PyLops takes the SciPy adapter: in its composites, its dot test, its solvers."""

import numpy as np
import pytest
import scipy.linalg
import torch

from torchlinop import CountingOperator, GGNOperator, MatrixOperator, as_linear_operator
from torchlinop.testing.gallery import mlp, of_inputs, with_spectrum

pylops = pytest.importorskip("pylops")

N = 20


def problem(dtype=torch.float64):
    """An adapter and its dense matrix, with condition 10."""
    matrix = with_spectrum(torch.linspace(1, 10, N).double())[0].to(dtype)
    return as_linear_operator(MatrixOperator(matrix)), matrix.double().numpy()


def gaussian(*shape, dtype=np.float64):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def rounding(A):
    """n u ‖D‖, of a product with entries of order one."""
    return 10 * N * np.finfo(A.dtype).eps


precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])

COMPOSITES = {
    "itself": (lambda Op: Op, lambda D: D),
    "adjoint": (lambda Op: Op.H, lambda D: D),
    "multiple": (lambda Op: 2.0 * Op, lambda D: 2 * D),
    "product": (lambda Op: Op @ Op, lambda D: D @ D),
    "sum": (lambda Op: Op + 2.0 * Op, lambda D: 3 * D),
    "VStack": (lambda Op: pylops.VStack([Op, Op]), lambda D: np.vstack([D, D])),
    "HStack": (lambda Op: pylops.HStack([Op, -Op]), lambda D: np.hstack([D, -D])),
    "BlockDiag": (
        lambda Op: pylops.BlockDiag([Op, Op]),
        lambda D: np.kron(np.eye(2), D),
    ),
    "adjoint of VStack": (lambda Op: pylops.VStack([Op, Op]).H, lambda D: np.hstack([D, D])),
}


@precisions
@pytest.mark.parametrize("columns", [None, 3])
@pytest.mark.parametrize("composite", COMPOSITES)
def test_pylops_composite_is_the_composite_of_matrices(composite, columns, dtype):
    A, D = problem(dtype)
    of_operators, of_matrices = COMPOSITES[composite]
    Op, matrix = of_operators(pylops.aslinearoperator(A)), of_matrices(D)
    x = gaussian(matrix.shape[1], *([columns] if columns else []), dtype=A.dtype)
    tolerance = 10 * rounding(A)  # the square has norm 100
    np.testing.assert_allclose(Op @ x, matrix @ x, rtol=0, atol=tolerance)


@precisions
@pytest.mark.parametrize("complexflag", [0, 3])
def test_adapter_passes_the_dot_test_of_pylops(complexflag, dtype):
    A, _ = problem(dtype)
    Op = pylops.aslinearoperator(A)
    np.random.seed(0)  # dottest draws from the global generator
    assert pylops.utils.dottest(Op, N, N, rtol=rounding(A), complexflag=complexflag)


@precisions
@pytest.mark.parametrize("solver", ["cg", "cgls", "lsqr"])
def test_solvers_of_pylops_solve(solver, dtype):
    A, D = problem(dtype)
    b = gaussian(N, dtype=A.dtype)
    solve = getattr(pylops.optimization.basic, solver)
    x = solve(pylops.aslinearoperator(A), b, np.zeros(N, dtype=A.dtype), niter=10 * N)[0]
    # cgls squares the condition 10 of D; the default tolerances stop at 1e-4.
    np.testing.assert_allclose(x, np.linalg.solve(D, b), rtol=0, atol=1e-2)


def test_division_of_pylops_solves():
    A, D = problem()
    b = gaussian(N)
    np.testing.assert_allclose(
        pylops.aslinearoperator(A) / b, np.linalg.solve(D, b), rtol=0, atol=1e-4
    )


@precisions
def test_eigenvalues_by_pylops_are_those_of_the_matrix(dtype):
    A, D = problem(dtype)
    v0 = np.ones(N, dtype=A.dtype)
    values = pylops.aslinearoperator(A).eigs(3, symmetric=True, v0=v0)
    np.testing.assert_allclose(values, scipy.linalg.eigvalsh(D)[:-4:-1], rtol=rounding(A))


def test_a_damped_step_of_a_network_is_a_regularised_inversion_of_pylops():
    p = mlp()
    G = GGNOperator(p.model, p.batches, of_inputs, p.criterion)
    D, b = G.to_dense().numpy(), gaussian(G.size)
    Op = pylops.aslinearoperator(as_linear_operator(G))
    # min ||G x - b||^2 + 0.01 ||x||^2 has the solution (G G + 0.01 I)^-1 G b.
    x = pylops.optimization.leastsquares.regularized_inversion(
        Op, b, [0.1 * pylops.Identity(G.size)], iter_lim=500, atol=1e-14, btol=1e-14
    )[0]
    expected = np.linalg.solve(D @ D + 0.01 * np.eye(G.size), D @ b)
    np.testing.assert_allclose(x, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


def test_products_of_pylops_are_counted_once():
    A, _ = problem()
    counted = CountingOperator(A.operator)
    Op = pylops.aslinearoperator(as_linear_operator(counted))
    Op.matvec(gaussian(N))
    Op.rmatvec(gaussian(N))
    Op.matmat(gaussian(N, 3))
    assert counted.matvecs == 5
