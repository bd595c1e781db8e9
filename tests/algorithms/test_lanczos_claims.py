"""What Lanczos must not claim: an order that it has not seen, digits that rounding took."""

import pytest
import torch
from eigen_spectra import matrix, spectrum

from torchlinop import MatrixOperator, VectorSpace
from torchlinop.algorithms.basis import Basis
from torchlinop.algorithms.krylov_schur import KrylovDecomposition
from torchlinop.algorithms.lanczos import lanczos
from torchlinop.algorithms.orthogonal import extended
from torchlinop.algorithms.products import Products
from torchlinop.errors import NotConvergedError, NotConvergedWarning

CPU = torch.device("cpu")


def rank_one(n=30):
    v = VectorSpace(n, torch.float64, CPU).random(1)
    return MatrixOperator(3 * v @ v.T / (v.T @ v))


@pytest.mark.parametrize("options", [{"max_iter": 7}, {"max_iter": 9, "block_size": 3}])
def test_pairs_are_not_called_converged_while_others_may_be_nearer_to_the_end(options):
    with pytest.warns(NotConvergedWarning, match="eigenvalues beyond those found may be missing"):
        result = lanczos(rank_one(), 7, which="SA", **options)
    assert result.status == "maxmatvecs"
    assert not result.converged.any()
    with pytest.raises(NotConvergedError, match="outside: eigenvalues beyond"):
        lanczos(rank_one(), 7, which="SA", strict=True, **options)


def test_two_more_products_settle_the_order():
    result = lanczos(rank_one(), 7, which="SA", max_iter=9)
    assert result.status == "exact"
    assert result.converged.all()
    torch.testing.assert_close(result.eigenvalues, torch.zeros(7).double(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("rank", [3, 5, 8, 12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128])
def test_copies_of_zero_are_found_where_rounding_hides_that_a_krylov_space_has_ended(rank, dtype):
    # Its end is not seen as a residual of rounding's size: steps have amplified that.
    eigenvalues = torch.zeros(100, dtype=torch.float64)
    eigenvalues[:rank] = torch.linspace(1, 3, rank)
    eigenvalues[0] = -1
    A = MatrixOperator(matrix(eigenvalues, dtype))
    expected = torch.tensor([-1, 0, 0, 0], dtype=torch.float64)
    for seed in range(5):
        result = lanczos(A, 4, which="SA", seed=seed)
        assert result.converged.all()
        atol = 30 * torch.finfo(dtype).eps
        torch.testing.assert_close(result.eigenvalues.double(), expected, rtol=0, atol=atol)


@pytest.mark.filterwarnings("ignore::torchlinop.errors.NotConvergedWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_half_precision_claims_no_digits_that_few_products_cannot_show(n, dtype):
    ratios = []
    for seed in range(20):
        G = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        A = (G @ G.T / n).to(dtype)
        result = lanczos(MatrixOperator(A), 2, which="LA")
        X, values = result.eigenvectors.double(), result.eigenvalues.double()
        true = torch.linalg.vector_norm(A.double() @ X - X * values, dim=0)
        ratios.append(float((true / result.residual_norms).max()))
    assert max(ratios) < 1.5
    assert sum(ratio > 1.1 for ratio in ratios) <= 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128])
def test_a_column_is_extended_by_one_inner_product(dtype):
    space = VectorSpace(500, dtype, CPU)
    V = torch.linalg.qr(space.random(6))[0].mT.contiguous().mT
    w = V[:, 5:] * 0.3 + V[:, :5] @ (1e-5 * space.random(1)[:5])
    whole = torch.cat([V[:, :5], w], 1).mT.contiguous().mT
    c, s, lost = extended(space, whole, 1e-3)
    eps = torch.finfo(dtype).eps
    assert float((whole.mH @ whole - torch.eye(6)).abs().max()) < 20 * eps
    again = whole[:, :5] @ c.to(dtype) + whole[:, 5:] * s.to(dtype)
    torch.testing.assert_close(again, w, rtol=0, atol=20 * eps)
    assert not lost.any()


@pytest.mark.parametrize(("threshold", "share"), [(1.0, 1.0), (1e-3, 1e-4)])
def test_a_column_too_short_or_in_the_span_is_lost(threshold, share):
    space = VectorSpace(500, torch.float64, CPU)
    V = torch.linalg.qr(space.random(4))[0].mT.contiguous().mT
    V[:, 3] = 0.3 * (share * V[:, 3] + (1 - share) * V[:, 0])
    _, s, lost = extended(space, V, threshold)
    assert not V[:, 3].any()
    assert float(s) == 0
    assert float(lost) == pytest.approx(0.3 * share, rel=1e-2)


class _Communicating(VectorSpace):
    """Counts what shards would add up."""

    def inner(self, X, Y):
        self.sums.append("inner")
        return super().inner(X, Y)

    def norm(self, v):
        self.sums.append("norm")
        return super().norm(v)


def test_a_step_adds_up_over_shards_twice():
    A = matrix(spectrum("nn", 300))
    op, sums = MatrixOperator(A), []
    q = op.space.random(1)
    q /= torch.linalg.vector_norm(q)
    space = _Communicating(300, A.dtype, CPU)
    object.__setattr__(space, "sums", sums)
    basis = Basis(space, q, 11, dtype=None, device=None)
    V = KrylovDecomposition(Products(op), basis, q, 10, 0)
    for _ in range(3):
        V.expand()
        V.scaled = True  # the scale is known from then on
    sums.clear()
    V.expand()
    assert sums == ["inner", "inner"]
