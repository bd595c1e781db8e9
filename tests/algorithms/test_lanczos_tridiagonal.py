"""A V = V T + r eᵀ in every mode of reorthogonalisation, and what becomes of copies."""

import pytest
import torch
from eigen_spectra import F64, matrix, spectrum

from torchlinop import MatrixOperator
from torchlinop.algorithms.lanczos import lanczos
from torchlinop.algorithms.tridiagonal import lanczos_tridiagonal
from torchlinop.errors import OptionError, OrthogonalityWarning, TorchlinopWarning, VectorError

EXACT = spectrum("nn", 300)  # ten positive outliers first, five negative ones last
A = matrix(EXACT)
OPERATOR = MatrixOperator(A)
OUTLIERS = torch.cat([EXACT[:10], EXACT[-5:]])


@pytest.mark.parametrize("mode", ["full", "partial"])
@pytest.mark.parametrize("steps", [100, 200])
def test_no_eigenvalue_comes_twice_from_an_orthogonal_basis(mode, steps):
    operator = OPERATOR
    T = lanczos_tridiagonal(operator, operator.space.random(1)[:, 0], steps, reorthogonalize=mode)
    ritz = torch.linalg.eigvalsh(T.matrix())
    near = (ritz[:, None] - OUTLIERS).abs() < 1e-5
    assert near.sum(0).tolist() == [1] * 15
    loss = (T.basis.T @ T.basis - torch.eye(steps)).abs().max()
    assert float(loss) < {"full": 1e-13, "partial": 1e-7}[mode]


@pytest.mark.parametrize("seed", range(4))
def test_partial_orthogonality_holds_where_each_step_loses_seven_digits(seed):
    decaying = 0.8 ** torch.arange(250, dtype=F64)
    operator = MatrixOperator(matrix(decaying))
    v0 = operator.space.random(1, seed)[:, 0]
    T = lanczos_tridiagonal(operator, v0, 200, reorthogonalize="partial")
    assert float((T.basis.T @ T.basis - torch.eye(T.iterations)).abs().max()) < 1e-6
    ritz = torch.linalg.eigvalsh(T.matrix()).flip(0)[:60]
    torch.testing.assert_close(ritz, decaying[:60], rtol=0, atol=1e-13)


@pytest.mark.parametrize("mode", ["none", "local"])
def test_a_copy_that_is_about_to_converge_is_not_called_converged(mode):
    outliers = torch.tensor([100.0, 50, 20, 10, 5, -3, -1], dtype=F64)
    bulk = 0.01 * torch.randn(193, dtype=F64, generator=torch.Generator().manual_seed(0))
    operator = MatrixOperator(matrix(torch.cat([outliers, bulk])))
    copies = []
    for steps in range(12, 80):
        with pytest.warns(TorchlinopWarning):
            result = lanczos(operator, 5, steps, reorthogonalize=mode)
        X = result.eigenvectors[:, result.converged]
        copies += [steps] if float((X.T @ X).fill_diagonal_(0).abs().max()) > 0.1 else []
    assert copies == []


@pytest.mark.parametrize("mode", [True, "full", "partial", "local", "none", False])
def test_tridiagonal_satisfies_the_lanczos_relation(mode):
    operator = OPERATOR
    T = lanczos_tridiagonal(operator, operator.space.random(1)[:, 0], 15, reorthogonalize=mode)
    V, defect = T.basis, operator @ T.basis - T.basis @ T.matrix()
    torch.testing.assert_close(defect[:, :-1], torch.zeros(300, 14).double(), rtol=0, atol=1e-13)
    assert float(torch.linalg.vector_norm(defect[:, -1])) == pytest.approx(T.residual_norm)
    assert float((V.T @ defect[:, -1]).abs().max()) < 1e-6
    assert (T.iterations, T.matvecs) == (15, 15)


@pytest.mark.parametrize(("name", "values"), [("1 and 50", [1.0, 50.0]), ("rank 1", [0.0, 10.0])])
@pytest.mark.parametrize("mode", ["full", "partial", "local", "none"])
def test_tridiagonal_stops_at_an_invariant_subspace(name, values, mode):
    operator = MatrixOperator(matrix(spectrum(name, 300)))
    v0 = operator.space.random(1)[:, 0]
    T = lanczos_tridiagonal(operator, v0, 50, reorthogonalize=mode)
    assert (T.iterations, T.residual_norm) == (2, 0.0)
    assert T.matvecs <= 4
    ritz = torch.linalg.eigvalsh(T.matrix())
    torch.testing.assert_close(ritz, torch.tensor(values).double(), rtol=1e-14, atol=1e-14)


def test_tridiagonal_without_a_basis_is_that_with_one():
    operator = OPERATOR
    v0 = operator.space.random(1)[:, 0]
    kept, not_kept = (
        lanczos_tridiagonal(operator, v0, 30, reorthogonalize=False, keep_basis=keep)
        for keep in (True, False)
    )
    assert not_kept.basis is None
    assert torch.equal(kept.alpha, not_kept.alpha)
    assert torch.equal(kept.beta, not_kept.beta)
    assert "30 steps | 30 matvecs" in repr(not_kept)


def test_bad_arguments_of_the_tridiagonalization_are_refused():
    v0 = torch.ones(300, dtype=F64)
    with pytest.raises(OptionError, match="expected steps to be at least 1, got 0"):
        lanczos_tridiagonal(OPERATOR, v0, 0)
    with pytest.raises(OptionError, match=r"'full' needs the basis; pass keep_basis=True"):
        lanczos_tridiagonal(OPERATOR, v0, 5, keep_basis=False)
    with pytest.raises(VectorError, match=r"expected v0 of shape \(300,\)"):
        lanczos_tridiagonal(OPERATOR, v0[1:], 5)
    with pytest.raises(VectorError, match=r"finite v0 other than zero, got norm 0\.0"):
        lanczos_tridiagonal(OPERATOR, 0 * v0, 5)


@pytest.mark.parametrize("mode", ["local", "none"])
def test_copies_come_without_reorthogonalization_and_lanczos_keeps_one_each(mode):
    operator = OPERATOR
    T = lanczos_tridiagonal(operator, operator.space.random(1)[:, 0], 100, reorthogonalize=mode)
    near = (torch.linalg.eigvalsh(T.matrix())[:, None] - OUTLIERS).abs() < 1e-5
    assert int(near.sum()) > 15 + 20
    with pytest.warns(TorchlinopWarning) as caught:
        result = lanczos(operator, 5, 100, which="LA", reorthogonalize=mode)
    assert caught[0].category is OrthogonalityWarning
    assert f"reorthogonalize='{mode}': converged eigenvalues come in copies" in str(
        caught[0].message
    )
    found = result.eigenvalues[result.converged]
    assert len(found) >= 3
    assert bool(((found[:, None] - EXACT[:5]).abs() < 1e-8).sum(1).eq(1).all())
    assert bool((found.diff() < -0.1).all())  # each once
