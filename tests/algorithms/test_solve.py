"""A solve that is stopped returns what there is; inverses, K-FAC and small numbers in solves."""

import pytest
import torch
from torch import nn

from torchlinop import EKFACOperator, GGNOperator, LambdaOperator, MatrixOperator
from torchlinop.algorithms.matrix_function import apply_function
from torchlinop.algorithms.quadrature import slq
from torchlinop.algorithms.solve import inverse, solve
from torchlinop.errors import (
    MemoryEstimateError,
    NotConvergedError,
    NotConvergedWarning,
    OptionError,
)
from torchlinop.testing.gallery import of_inputs, with_spectrum

F64 = torch.float64
A = with_spectrum(torch.logspace(-3, 0, 90, dtype=F64))[0]
B = torch.randn(90, 3, generator=torch.Generator().manual_seed(1), dtype=F64)


def limited(products, error=KeyboardInterrupt):
    """The matrix, which raises once instead of giving one block of products more."""
    count = iter(range(10_000))

    def matmat(V):
        if next(count) == products:
            raise error
        return A @ V

    return LambdaOperator(90, lambda v: A @ v, matmat=matmat, dtype=F64)


@pytest.mark.parametrize("method", ["cg", "minres"])
@pytest.mark.parametrize("products", [1, 2, 17, 50, 51, 70])
def test_an_interrupted_solve_returns_true_residuals_of_what_there_is(method, products):
    with pytest.warns(NotConvergedWarning, match=r"interrupted\)\. It was interrupted"):
        result = solve(limited(products), B, method=method, rtol=1e-12)
    assert result.status == ("interrupted",) * 3
    residuals = (B - A @ result.x).norm(dim=0)
    torch.testing.assert_close(result.residual_norms, residuals, rtol=1e-9, atol=0)
    if method == "minres":
        assert (residuals <= B.norm(dim=0)).all()


def test_a_solve_interrupted_before_its_first_product_has_no_result():
    with pytest.raises(KeyboardInterrupt):
        solve(limited(0), B)


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_time_ends_a_solve_after_the_step_it_is_in(method):
    with pytest.warns(NotConvergedWarning, match="maxseconds.*Raise max_seconds"):
        result = solve(MatrixOperator(A), B, method=method, max_seconds=1e-9)
    assert result.status == ("maxseconds",) * 3
    assert result.iterations.tolist() == [1, 1, 1]


@pytest.mark.parametrize("call", [solve, lambda op, b, **o: inverse(op, **o) @ b])
def test_strict_raises_with_the_result(call):
    with pytest.raises(NotConvergedError, match=r"0 of 3 systems reached rtol=1\.0e-12") as raised:
        call(MatrixOperator(A), B, rtol=1e-12, max_iter=5, strict=True)
    assert raised.value.result.status == ("max_iter",) * 3


def test_an_inverse_that_does_not_converge_warns_of_its_residual():
    with pytest.warns(NotConvergedWarning, match="worst residual .* Raise max_iter"):
        inverse(MatrixOperator(A), max_iter=5) @ B


@pytest.mark.parametrize(
    ("known", "damping", "inverse_known"),
    [(True, 0.0, True), (True, 0.1, True), (True, -0.1, False), (False, 0.1, False)],
)
def test_the_inverse_of_a_positive_semidefinite_matrix_is_one(known, damping, inverse_known):
    op = LambdaOperator(9, lambda v: v)
    op.positive_semidefinite = known
    assert inverse(op, damping).positive_semidefinite == inverse_known


def test_running_out_of_memory_is_named():
    with pytest.raises(MemoryEstimateError, match="ran out in product 10"):
        solve(limited(3, RuntimeError("not enough memory")), B)


def test_progress_is_shown_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    solve(MatrixOperator(torch.eye(3)), torch.ones(3), progress=True)
    assert "2matvec" in capsys.readouterr().err


@pytest.mark.parametrize("power", [-100, -83, 60, 100])
@pytest.mark.parametrize("method", ["cg", "minres"])
def test_a_power_of_two_scales_the_solution_and_nothing_else(method, power):
    b = B[:, 0].float()
    plain, scaled = (
        solve(MatrixOperator(A.float()), c, 0.1, method=method) for c in (b, b * 2.0**power)
    )
    assert torch.equal(scaled.x, plain.x * 2.0**power)
    assert torch.equal(scaled.relative_residuals, plain.relative_residuals)
    assert torch.equal(scaled.residual_norms, plain.residual_norms * 2.0**power)


@pytest.mark.parametrize("power", [-85, 85])
@pytest.mark.parametrize(
    "call",
    [
        lambda op: solve(op, B[:, 0].float()),
        lambda op: slq(op, 2, 10),
        lambda op: apply_function(op, torch.exp, B.float()),
    ],
)
def test_a_matrix_too_small_or_large_to_be_squared_is_refused(call, power):
    with pytest.raises(
        OptionError, match=r"expected ‖A‖ between 1e-15 and 2e\+15, .* power of two"
    ):
        call(MatrixOperator(A.float() * 2.0**power))


@pytest.mark.parametrize("method", ["cg", "minres"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.complex128])
def test_preconditioned_and_damped_systems_are_solved_in_every_dtype(method, dtype):
    eigenvalues = torch.logspace(-1, 0, 60, dtype=F64)
    H, Q = with_spectrum(eigenvalues)
    M = MatrixOperator(((Q / (eigenvalues + 0.5)) @ Q.T).to(dtype))
    b = B[:60, 0].to(dtype)
    rtol = 0.03 if dtype == torch.bfloat16 else 1e-5
    result = solve(MatrixOperator(H.to(dtype)), b, 0.5, M, method, rtol=rtol)
    assert result.converged.all()
    assert int(result.iterations) <= 4
    wide = torch.promote_types(dtype, F64)
    residual = b.to(wide) - (H.to(dtype).to(wide) + 0.5 * torch.eye(60)) @ result.x.to(wide)
    assert residual.norm() <= 1.2 * rtol * b.to(wide).norm()


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_ekfac_of_one_linear_layer_is_its_ggn_and_preconditions_perfectly(method):
    torch.manual_seed(0)
    inputs = torch.randn(80, 8, dtype=F64) * torch.logspace(-2, 0, 8, dtype=F64)
    batches = [(inputs, torch.randn(80, 3, dtype=F64))]
    args = (nn.Linear(8, 3, bias=False).double(), batches, of_inputs, nn.MSELoss())
    G, damping = GGNOperator(*args), 1e-5
    b = G.space.random(1, 7)[:, 0]
    plain = solve(G, b, damping, method=method, rtol=1e-8)
    helped = solve(G, b, damping, EKFACOperator(*args).inverse(damping), method, rtol=1e-8)
    assert int(helped.iterations) <= 2
    assert int(plain.iterations) >= 8
    exact = torch.linalg.solve(G.to_dense() + damping * torch.eye(G.size), b)
    torch.testing.assert_close(helped.x, exact, rtol=0, atol=1e-5 * float(exact.norm()))
