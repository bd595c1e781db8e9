"""What the core of Lanczos claims, costs and survives: residuals, products, scales, allocations."""

import pytest
import torch
from eigen_spectra import matrix, spectrum
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchlinop import CountingOperator, DiagonalOperator, LambdaOperator, MatrixOperator
from torchlinop.algorithms.basis import Basis
from torchlinop.algorithms.conjugate_gradient import conjugate_gradient
from torchlinop.algorithms.krylov_schur import KrylovDecomposition
from torchlinop.algorithms.lanczos import lanczos
from torchlinop.algorithms.lobpcg import lobpcg
from torchlinop.algorithms.orthogonal import factored, orthonormalize, random_block
from torchlinop.algorithms.power_iteration import deflated_power_iteration
from torchlinop.algorithms.products import Products
from torchlinop.algorithms.randomized_eigh import randomized_eigh
from torchlinop.algorithms.scaled_product import scaled_product
from torchlinop.algorithms.tridiagonal import lanczos_tridiagonal

NAMES = ["poly", "slow", "cluster", "nn", "nnhard", "rank 5", "1 and 50", "4-fold"]
SHAPES = [(1, 6, 1), (5, 20, 1), (10, 14, 1), (5, 30, 3)]  # k, ncv, block_size


@pytest.mark.filterwarnings("ignore::torchlinop.errors.NotConvergedWarning")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-15), (torch.float32, 1e-7)])
@pytest.mark.parametrize("name", NAMES)
def test_no_residual_is_larger_than_claimed_where_rounding_is_all(name, dtype, tol, shape):
    k, ncv, b = shape
    A = matrix(spectrum(name, 300), dtype)
    result = lanczos(MatrixOperator(A), k, 4000, which="LA", tol=tol, ncv=ncv, block_size=b)
    A, X = A.double(), result.eigenvectors.double()
    true = torch.linalg.vector_norm(A @ X - X * result.eigenvalues.double(), dim=0)
    # The difference itself is rounded: products of n = 300 entries in float64, by about √n ε / 16.
    rounding = 2 * torch.finfo(torch.float64).eps * float(spectrum(name, 300).abs().max())
    assert (true <= 1.1 * result.residual_norms + rounding).all()


SOLVERS = {
    "partial": lambda op, tol: lanczos(op, 5, 50, tol=tol, reorthogonalize="partial"),
    "local": lambda op, tol: lanczos(op, 5, 50, tol=tol, reorthogonalize="local"),
    "none": lambda op, tol: lanczos(op, 5, 50, tol=tol, reorthogonalize="none"),
    "verify": lambda op, tol: lanczos(op, 5, 200, tol=tol, verify=True),
    "lobpcg": lambda op, tol: lobpcg(op, 5, 250, tol=tol),
    "recurrence": lambda op, tol: lobpcg(op, 5, 250, tol=tol, verify=False),
    "power": lambda op, tol: deflated_power_iteration(op, 2, 60, tol=tol),
    "randomized": lambda op, tol: randomized_eigh(op, 5, tol=tol, power_iterations=3),
}


@pytest.mark.filterwarnings("ignore::torchlinop.errors.TorchlinopWarning")
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-15), (torch.float32, 1e-7)])
@pytest.mark.parametrize("name", ["slow", "rank 5", "4-fold", "condition 1e16"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_no_solver_claims_a_residual_below_the_true_one(solver, name, dtype, tol):
    A = matrix(spectrum(name, 50), dtype)
    result = SOLVERS[solver](MatrixOperator(A), tol)
    A, X = A.double(), result.eigenvectors.double()
    true = torch.linalg.vector_norm(A @ X - X * result.eigenvalues.double(), dim=0)
    assert (true <= 1.1 * result.residual_norms).all()


def test_directions_dropped_at_a_breakdown_are_part_of_the_residual():
    A = matrix(spectrum("1 and 50", 300))
    products = Products(MatrixOperator(A))
    q = random_block(products.operator.space, 1, 0, 0)
    orthonormalize(products.operator.space, q, 0.0)
    basis = Basis(products.operator.space, q, 10, dtype=None, device=None)
    V = KrylovDecomposition(products, basis, q, 9, 0)
    V.expand()
    V.expand()  # two different eigenvalues: A V = V T, to rounding
    T, Q = V.T[:2, :2].clone(), basis.columns(0, 2).clone()
    left = torch.linalg.vector_norm(A @ Q[:, 1] - Q @ T[:, 1])
    assert float(V.T[2, 1]) == 0 < float(left)
    torch.testing.assert_close(V.errors[1], left, rtol=0.2, atol=50 * 1e-15)


def test_lengths_lost_are_those_of_the_columns_that_became_zero():
    space = DiagonalOperator(torch.ones(50, dtype=torch.float64)).space
    W = space.random(3)
    W[:, 1] = 2 * W[:, 0] + 1e-6 * W[:, 2]
    left = torch.linalg.lstsq(W[:, :1], W[:, 1:2]).solution
    R, lost = factored(space, W.clone(), 1e-3)
    assert torch.equal(lost == 0, R.diagonal() > 0)
    torch.testing.assert_close(lost[1], torch.linalg.vector_norm(W[:, 1:2] - W[:, :1] @ left))


# n = 4000, k = 10: what a thick-restart Lanczos of 21 vectors that looks at its end only takes;
# and what is least with 40 vectors, by a look at every product (25, 43, 54, 24, 54), and 10 % more.
LEAST = {
    "poly": (27, 28),
    "slow": (45, 48),
    "cluster": (57, 60),
    "nn": (27, 27),
    "nnhard": (81, 60),
}


@pytest.mark.parametrize("name", LEAST)
def test_convergence_is_noticed_within_few_products(name):
    operator = DiagonalOperator(spectrum(name, 4000))
    for ncv, products in zip((21, 40), LEAST[name], strict=True):
        result = lanczos(operator, 10, which="LA", ncv=ncv)
        assert result.matvecs <= products
        assert len(result.history_matvecs) <= 12 + 3 * result.restarts  # looks, each a wait


# In float32, squares underflow below 1e-19 and overflow above 1e19.
@pytest.mark.parametrize("scale", [1e-37, 1e-35, 1e-25, 1e25, 1e35, 1e37])
@pytest.mark.parametrize("options", [{}, {"block_size": 3}, {"reorthogonalize": "partial"}])
def test_a_float32_matrix_may_have_any_scale(scale, options):
    A = matrix(spectrum("nn", 300) / 10)
    operator = MatrixOperator((A * scale).float())
    result = lanczos(operator, 5, which="LA", **options)
    exact = spectrum("nn", 300)[:5] / 10
    assert result.converged.all()
    torch.testing.assert_close(result.eigenvalues.double() / scale, exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("p", [-70, 110])
@pytest.mark.parametrize("options", [{}, {"block_size": 3}, {"basis_dtype": torch.float16}])
def test_powers_of_two_far_from_one_scale_every_number_exactly(p, options):
    A, options = matrix(spectrum("nn", 300)).float(), {"k": 5, "tol": 1e-2, **options}
    one, scaled = (lanczos(MatrixOperator(A * s), **options) for s in (1.0, 2.0**p))
    assert torch.equal(one.eigenvectors, scaled.eigenvectors)
    assert torch.equal(one.eigenvalues.double() * 2.0**p, scaled.eigenvalues.double())
    assert torch.equal(one.residual_norms * 2.0**p, scaled.residual_norms)


@pytest.mark.parametrize("p", [-70, 110])
def test_powers_of_two_scale_a_tridiagonal_matrix_exactly(p):
    A, v0 = matrix(spectrum("nn", 300)).float(), torch.ones(300)
    one, scaled = (lanczos_tridiagonal(MatrixOperator(A * s), v0, 30) for s in (1.0, 2.0**p))
    assert torch.equal(one.alpha * 2.0**p, scaled.alpha)
    assert torch.equal(one.beta * 2.0**p, scaled.beta)
    assert torch.equal(one.basis, scaled.basis)


@pytest.mark.parametrize("estimate", [None, 3e-40, 1e-30, 1e-20])
def test_a_product_is_scaled_by_a_power_of_two(estimate):
    d = torch.linspace(-1, 1, 40) * 1e-30
    v = torch.ones(40, 1)
    norm = None if estimate is None else torch.tensor(estimate, dtype=torch.float64)
    W = torch.empty(40, 1)
    s = scaled_product(Products(DiagonalOperator(d)), v, norm, W)
    assert float(torch.frexp(s).mantissa) == 0.5
    torch.testing.assert_close(s * W[:, 0].double(), d.double(), rtol=1e-6, atol=1e-45)
    assert estimate is not None or 0.5 <= float(W.abs().max()) <= 2


def test_products_that_are_zero_are_scaled_by_one():
    W = torch.empty(5, 1)
    s = scaled_product(Products(DiagonalOperator(torch.zeros(5))), torch.ones(5, 1), None, W)
    assert float(s) == 1
    assert not W.any()


class _Allocated(TorchDispatchMode):
    """Counts operations that return new memory of at least n entries."""

    def __init__(self, n):
        super().__init__()
        self.n, self.count, self.syncs = n, 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((arguments, options or {}))
                  if isinstance(t, torch.Tensor)}  # fmt: skip
        result = function(*arguments, **(options or {}))
        for t in tree_leaves(result):
            new = isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in inputs
            self.count += new and t.numel() >= self.n
        self.syncs += function is torch.ops.aten._local_scalar_dense.default
        return result


@pytest.mark.parametrize("after_restart", [False, True])
def test_a_step_allocates_one_vector_besides_the_product_and_reads_nothing_back(after_restart):
    n, d = 5000, torch.linspace(0.1, 1, 5000, dtype=torch.float64)
    products = Products(LambdaOperator(n, lambda v: d * v, dtype=torch.float64))
    q = random_block(products.operator.space, 1, 0, 0)
    orthonormalize(products.operator.space, q, 0.0)
    V = KrylovDecomposition(products, Basis(products.operator.space, q, 11, dtype=None,
                                            device=None), q, 10, 0)  # fmt: skip
    for _ in range(10):
        V.expand()
    ritz, _ = V.observe("LA", 0)
    if after_restart:
        V.restart(ritz, 5)
    else:
        V.size = 9
        V.previous, V.block = V.basis.columns(8, 9), V.basis.columns(9, 10)
    with _Allocated(n) as allocated:
        V.expand()
    assert allocated.count <= 2  # the product, and a copy in which an operator may hand it out
    assert allocated.syncs == 0


@pytest.fixture(scope="module")
def slowly_decaying():
    """diag(i^(-1/2)) of a million entries, in single precision."""
    d = torch.arange(1, 1_000_001, dtype=torch.float64).pow(-0.5).float()
    return LambdaOperator(len(d), lambda v: d * v), d


def test_rounding_of_long_sums_neither_ends_a_run_nor_looks_like_asymmetry(slowly_decaying):
    A, d = slowly_decaying
    counted = CountingOperator(A)
    result = lanczos(counted, 5)
    assert result.status == "converged"
    assert counted.matvecs == result.matvecs <= 45  # no products of a check of symmetry
    torch.testing.assert_close(result.eigenvalues, d[:5], rtol=1e-6, atol=0)


def test_conjugate_gradients_of_a_million_single_precision_entries_reach_their_last_digit():
    d = torch.linspace(1, 30, 1_000_000)
    A, b = LambdaOperator(len(d), lambda v: d * v), torch.ones(len(d))
    result = conjugate_gradient(A, b, rtol=3e-7)
    residual = torch.linalg.vector_norm(d.double() * result.x.double() - b)
    assert float(residual) <= 4e-7 * len(d) ** 0.5
    assert result.iterations <= 60
