"""Eigenpairs are those of the prescribed spectrum, or are flagged as not found."""

import functools
import math

import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchlinop import CountingOperator, LambdaOperator, MatrixOperator, as_linear_operator
from torchlinop.algorithms.basis import Basis
from torchlinop.algorithms.krylov_schur import KrylovDecomposition
from torchlinop.algorithms.lanczos import lanczos
from torchlinop.algorithms.orthogonal import orthonormalize, random_block
from torchlinop.algorithms.products import Products
from torchlinop.testing.gallery import with_spectrum

float64 = torch.float64


def semicircle(n, radius):
    """The quantiles of Wigner's law."""
    x = torch.linspace(-1, 1, 20001, dtype=float64)
    cdf = 0.5 + (x * (1 - x**2).clamp_min(0).sqrt() + x.asin()) / math.pi
    at = torch.searchsorted(cdf, (torch.arange(n, dtype=float64) + 0.5) / n)
    return radius * x[at]


def on_zeros(values, n=300):
    return torch.cat([torch.tensor(values, dtype=float64), torch.zeros(n - len(values)).double()])


def network(n, lowest_outlier=2.0):
    positive = torch.logspace(1, math.log10(lowest_outlier), 10, dtype=float64)
    negative = torch.linspace(-1.5, -0.7, 5, dtype=float64)
    return torch.cat([positive, negative, semicircle(n - 15, 0.5)])


def power(n, exponent):
    return torch.arange(1, n + 1, dtype=float64) ** exponent


def cluster(n):
    top = torch.tensor([10.0] * 4 + [9.99] * 3 + [9, 8.999, 8.998], dtype=float64)
    uniform = torch.rand(n - 10, generator=torch.Generator().manual_seed(1), dtype=float64)
    return torch.cat([top, uniform])


# The spectrum, and how many pairs are asked for.
STRESS = {
    "identity": (torch.ones(300, dtype=float64), 10),
    "zero": (torch.zeros(300, dtype=float64), 10),
    "rank 1": (on_zeros([3.0]), 10),
    "rank 5": (on_zeros([5.0, 4, 3, 2, 1]), 10),
    "rank 6, one value twice": (on_zeros([5.0, 4, 4, 3, 2, 1]), 5),
    "1 and 50": (torch.tensor([50.0] * 20 + [1.0] * 280, dtype=float64), 10),
    "4-fold": (torch.cat([torch.full((4,), 10.0).double(), semicircle(296, 0.5)]), 4),
    "pairs": (torch.cat([power(20, -1), -power(20, -1), semicircle(260, 0.02)]), 10),
    "network": (network(300), 10),
    "network, 1e-12": (1e-12 * network(300), 10),
    "network, 1e+12": (1e12 * network(300), 10),
    "condition 1e16": (torch.logspace(0, -16, 300, dtype=float64), 10),
}


@functools.cache
def matrix(name):
    return with_spectrum(STRESS[name][0])[0]


@functools.cache
def of_network():
    return MatrixOperator(matrix("network"))


def wanted(values, k, which):
    """The k eigenvalues at an end, sorted."""
    ordered = values.sort(descending=True).values
    largest = values[values.abs().argsort(descending=True)]
    ends = torch.cat([ordered[: k - k // 2], ordered[len(values) - k // 2 :]])
    chosen = {"LA": ordered[:k], "SA": ordered.flip(0)[:k], "LM": largest[:k], "BE": ends}
    return chosen[which].sort().values


def true_residuals(A, result):
    X = result.eigenvectors.double()
    return torch.linalg.vector_norm(A @ X - X * result.eigenvalues.double(), dim=0)


@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "tol", "error"), [(float64, 1e-10, 1e-13), (torch.float32, 1e-5, 1e-6)]
)
@pytest.mark.parametrize("name", STRESS)
def test_stress_set_is_solved(name, dtype, tol, error, block_size):
    spectrum, k = STRESS[name]
    A = matrix(name).to(dtype)
    result = lanczos(MatrixOperator(A), k, which="LA", tol=tol, block_size=block_size)
    norm = max(float(spectrum.abs().max()), 1e-300)
    exact = wanted(spectrum, k, "LA").flip(0)
    assert float((result.eigenvalues.double() - exact).abs().max()) <= error * norm
    assert float(true_residuals(A.double(), result).max()) <= 2 * tol * norm
    assert result.orthogonality_loss <= 100 * torch.finfo(dtype).eps
    assert (result.status, bool(result.converged.all())) in {
        ("converged", True),
        ("exact", True),
    }


# The products a thick-restart Lanczos with 21 vectors takes for k = 10 and tol = 1e-6, on the same
# spectra with n = 4000.
BUDGETS = {
    "poly": (power(1000, -2.0), 27),
    "slow": (power(1000, -0.5), 45),
    "cluster": (cluster(1000), 57),
    "network": (network(1000), 27),
    "network, outliers at the bulk": (network(1000, 0.55), 81),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_products_are_within_budget_and_true_residuals_within_tol(name):
    spectrum, products = BUDGETS[name]
    A = with_spectrum(spectrum)[0]
    counted = CountingOperator(MatrixOperator(A), int(1.3 * products))
    result = lanczos(counted, 10, which="LA", ncv=21)
    assert result.status == "converged"
    assert result.matvecs == counted.matvecs
    assert bool((true_residuals(A, result) <= 1e-6 * result.eigenvalues).all())
    torch.testing.assert_close(
        result.eigenvalues, wanted(spectrum, 10, "LA").flip(0), rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
@pytest.mark.parametrize("k", [2, 4, 5])
def test_ends_of_the_spectrum_are_those_of_scipy(which, k):
    A = matrix("network")
    theirs = eigsh(as_linear_operator(of_network()), k, which=which, return_eigenvectors=False)
    ours = lanczos(of_network(), k, which=which).eigenvalues.sort().values
    torch.testing.assert_close(ours, torch.from_numpy(theirs).sort().values, rtol=0, atol=1e-9)
    torch.testing.assert_close(ours, wanted(torch.linalg.eigvalsh(A), k, which), rtol=0, atol=1e-9)


def test_values_come_in_the_order_wanted():
    by = {
        w: lanczos(of_network(), 12 if w == "LM" else 5, which=w).eigenvalues
        for w in ("LM", "LA", "SA", "BE")
    }
    assert (by["LM"].abs().diff() <= 0).all()
    assert (by["LA"].diff() < 0).all()
    assert (by["SA"].diff() > 0).all()
    assert (by["BE"].diff() < 0).all()


@pytest.mark.parametrize("p", [-40, 40])
@pytest.mark.parametrize("dtype", [float64, torch.float32])
def test_powers_of_two_scale_every_number_exactly(dtype, p):
    A = matrix("network").to(dtype)
    one, scaled = (lanczos(MatrixOperator(A * s), 10) for s in (1.0, 2.0**p))
    assert one.matvecs == scaled.matvecs
    assert torch.equal(one.eigenvalues * 2.0**p, scaled.eigenvalues)
    assert torch.equal(one.eigenvectors, scaled.eigenvectors)
    assert torch.equal(one.residual_norms * 2.0**p, scaled.residual_norms)


def test_complex_hermitian_matrices_have_real_eigenvalues():
    Q = torch.linalg.qr(torch.randn(200, 200, dtype=torch.complex128)).Q
    A = (Q * network(200)) @ Q.mH
    result = lanczos(MatrixOperator((A + A.mH) / 2), 5, which="LA", block_size=2)
    torch.testing.assert_close(result.eigenvalues, network(200)[:5], rtol=0, atol=1e-11)
    residual = A @ result.eigenvectors - result.eigenvectors * result.eigenvalues
    assert float(residual.abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("n", "k", "b"), [(1, 1, 1), (2, 2, 1), (7, 7, 3), (12, 5, 20), (25, 24, 4)]
)
def test_small_matrices_are_solved_whole(n, k, b):
    spectrum = torch.linspace(-1, 2, n, dtype=float64)
    result = lanczos(MatrixOperator(with_spectrum(spectrum)[0]), k, which="LA", block_size=b)
    exact = wanted(spectrum, k, "LA").flip(0)
    torch.testing.assert_close(result.eigenvalues, exact, rtol=0, atol=1e-13)
    assert result.status in ("exact", "converged")
    assert result.matvecs <= n + b


def decomposition(operator, b, m, **storage):
    start = random_block(operator.space, b, 0, 0)
    orthonormalize(operator.space, start, 0.0)
    basis = Basis(operator.space, start, m + b, **{"dtype": None, "device": None} | storage)
    return KrylovDecomposition(Products(operator), basis, start, m, 0)


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("name", ["network", "rank 5", "rank 1", "1 and 50", "zero"])
def test_a_v_is_v_t_plus_q_s_through_breakdowns_and_restarts(name, b):
    A, D = matrix(name), decomposition(MatrixOperator(matrix(name)), b, 24)
    norm = float(torch.linalg.matrix_norm(A, 2)) or 1.0
    for sizes in (12, 24, 24):
        checked = D.size
        while D.size < sizes:
            D.expand()
        ritz, _ = D.observe("LA", checked)
        if D.size == 24:
            D.restart(ritz, 12)
        VQ, j = D.basis.columns(0, D.size + D.width), D.size
        defect = A @ VQ[:, :j] - VQ @ D.T[: j + D.width, :j]
        assert float(defect.abs().max()) < 1e-13 * norm
        assert float((VQ.T @ VQ - torch.eye(j + D.width)).abs().max()) < 1e-13


class Watch(TorchDispatchMode):
    """Counts reads by the host, and new storages of at least so many bytes."""

    def __init__(self, nbytes):
        super().__init__()
        self.nbytes, self.reads, self.seen = nbytes, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.equal.default,
            torch.ops.aten.nonzero.default,
        )
        known = {
            t.untyped_storage().data_ptr()
            for t in tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            storage = t.untyped_storage() if isinstance(t, torch.Tensor) else None
            if storage and storage.nbytes() >= self.nbytes and storage.data_ptr() not in known:
                self.seen[len(self.seen)] = t  # kept alive, so that no address comes again
        return out


@pytest.mark.parametrize("b", [1, 3])
def test_a_step_reads_nothing_back_and_allocates_one_block(b):
    n = 5000
    operator = LambdaOperator(n, lambda v: 2 * v, matmat=lambda V: 2 * V, dtype=float64)
    D = decomposition(operator, b, 30)
    for _ in range(4):
        D.expand()
    product = Watch(8 * n)
    with product:
        operator.matmat(D.block)
    step = Watch(8 * n)
    with step:
        D.expand()
    assert step.reads == 0
    assert len(step.seen) <= len(product.seen) + (b > 1)  # columns made contiguous


def test_reads_by_the_host_grow_with_restarts_and_not_with_steps():
    reads = []
    for ncv in (21, 42):
        with Watch(math.inf) as watch:
            result = lanczos(of_network(), 10, which="LA", ncv=ncv, tol=1e-12)
        reads.append(watch.reads / len(result.history_matvecs))
    assert max(reads) < 40  # by the small matrices, on the CPU
    assert len(result.history_matvecs) <= 8 + 2 * result.restarts


@pytest.mark.parametrize(("stored", "error"), [(torch.bfloat16, 1e-5), (torch.float16, 1e-6)])
def test_a_coarse_basis_is_cleaned_up_in_working_precision(stored, error):
    A = matrix("network").float()
    result = lanczos(MatrixOperator(A), 10, which="LA", ncv=40, basis_dtype=stored)
    exact = STRESS["network"][0][:10]
    assert float((result.eigenvalues.double() - exact).abs().max()) <= error * 10
    assert (result.residual_kind, result.basis_dtype) == ("true", stored)
    assert result.orthogonality_loss < 1e-5
    assert bool(result.converged.all())
    reported = result.residual_norms
    torch.testing.assert_close(true_residuals(A.double(), result), reported, rtol=0, atol=1e-5)


def test_bfloat16_products_give_what_their_rounding_allows():
    result = lanczos(MatrixOperator(matrix("network").bfloat16()), 10, which="LA")
    exact = torch.linalg.eigvalsh(matrix("network").bfloat16().double()).flip(0)[:10]
    assert result.eigenvectors.dtype == torch.float32
    assert float((result.eigenvalues.double() - exact).abs().max()) < 2e-2
    assert result.tol == 2 * torch.finfo(torch.bfloat16).eps


def test_verified_residuals_are_those_of_k_more_products():
    plain, verified = (lanczos(of_network(), 6, which="LA", verify=v) for v in (False, True))
    assert verified.matvecs == plain.matvecs + 6
    assert (plain.residual_kind, verified.residual_kind) == ("recurrence", "true")
    true = true_residuals(matrix("network"), verified)
    torch.testing.assert_close(verified.residual_norms, true, rtol=1e-6, atol=1e-14)


def test_error_bounds_hold():
    result = lanczos(of_network(), 10, which="LA", tol=1e-3)
    errors = (result.eigenvalues - STRESS["network"][0][:10]).abs()
    assert bool((errors <= result.error_bounds + 1e-14).all())
    assert bool((result.error_bounds <= result.residual_norms).all())


def test_an_earlier_result_saves_products():
    A = matrix("network")
    moved = MatrixOperator(A + 1e-4 * with_spectrum(semicircle(300, 1.0), seed=5)[0])
    earlier = lanczos(of_network(), 10, which="LA", tol=1e-8)
    cold = lanczos(moved, 10, which="LA", tol=1e-3)
    warm = lanczos(moved, 10, which="LA", tol=1e-3, v0=earlier)
    assert warm.matvecs < cold.matvecs
    torch.testing.assert_close(warm.eigenvalues, cold.eigenvalues, rtol=1e-4, atol=0)


@pytest.mark.parametrize("columns", [0, 1, 2])
def test_a_start_may_be_a_vector_or_a_block(columns):
    V = of_network().space.random(max(columns, 1), seed=9)
    result = lanczos(of_network(), 5, which="LA", v0=V if columns else V[:, 0])
    assert result.matmats * max(columns, 1) == result.matvecs
    torch.testing.assert_close(result.eigenvalues, STRESS["network"][0][:5], rtol=0, atol=1e-9)


def test_a_start_in_an_eigenspace_does_not_hide_the_others():
    _, Q = with_spectrum(STRESS["network"][0])
    result = lanczos(of_network(), 3, which="LA", v0=Q[:, 200])
    torch.testing.assert_close(result.eigenvalues, STRESS["network"][0][:3], rtol=0, atol=1e-9)


def test_a_basis_elsewhere_gives_the_same_pairs():
    here = lanczos(of_network(), 5, which="LA")
    there = lanczos(of_network(), 5, which="LA", basis_device="cpu")
    assert torch.equal(here.eigenvalues, there.eigenvalues)


def test_automatic_blocks_are_of_one_or_four():
    result = lanczos(of_network(), 5, which="LA", block_size="auto")
    torch.testing.assert_close(result.eigenvalues, STRESS["network"][0][:5], rtol=0, atol=1e-9)
    assert result.method in ("thick-restart Lanczos", "thick-restart Lanczos, blocks of 4")


def test_a_callback_sees_the_history():
    told = []
    result = lanczos(of_network(), 5, which="LA", callback=lambda *a: told.append(a), progress=True)
    assert [matvecs for matvecs, _, _ in told] == result.history_matvecs.tolist()
    torch.testing.assert_close(told[-1][1], result.history_eigenvalues[-1])
