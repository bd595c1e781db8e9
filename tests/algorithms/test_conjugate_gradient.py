"""Solutions are those of dense solves, residuals are true, and what cannot be solved is said."""

import pickle

import pytest
import torch

from torchlinop import CountingOperator, MatrixOperator
from torchlinop.algorithms import column_iteration
from torchlinop.algorithms.conjugate_gradient import conjugate_gradient
from torchlinop.algorithms.solve import inverse, solve
from torchlinop.algorithms.solve_result import SolveResult
from torchlinop.errors import NonFiniteError, NotConvergedWarning, OptionError, VectorError
from torchlinop.testing.gallery import with_spectrum

F64 = torch.float64
POSITIVE = torch.logspace(-2, 1, 120, dtype=F64)


def right_hand_sides(n, columns=3):
    return torch.randn(n, columns, generator=torch.Generator().manual_seed(1), dtype=F64)


@pytest.mark.parametrize("method", ["cg", "minres", "auto"])
@pytest.mark.parametrize(("dtype", "rtol"), [(F64, 1e-11), (torch.float32, 1e-4)])
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_positive_definite_systems_are_solved(method, dtype, rtol, damping):
    A = with_spectrum(POSITIVE)[0].to(dtype)
    B = right_hand_sides(120).to(dtype)
    result = solve(MatrixOperator(A), B, damping, method=method, rtol=rtol)
    shifted = A.double() + damping * torch.eye(120, dtype=F64)
    residuals = (B.double() - shifted @ result.x.double()).norm(dim=0)
    assert result.converged.all()
    assert (residuals <= 1.1 * rtol * B.norm(dim=0)).all()
    exact = torch.linalg.solve(shifted, B.double())
    condition = float((POSITIVE[-1] + damping) / (POSITIVE[0] + damping))
    assert (result.x - exact).norm() <= 2 * condition * rtol * exact.norm()


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_columns_converge_each_at_its_own_speed(method):
    A, Q = with_spectrum(POSITIVE)
    B = torch.stack([Q[:, 5], Q[:, 0] + Q[:, 60], Q[:, ::40].sum(1), Q.sum(1), 0 * Q[:, 0]], 1)
    op = CountingOperator(MatrixOperator(A))
    result = solve(op, B, method=method, rtol=1e-9)
    assert result.iterations[:3].tolist() == [1, 2, 3]
    assert int(result.iterations[4]) == 0
    assert result.converged.all()
    # Dropped columns take no products: one for each iteration, one to confirm, one at each look.
    looks = int(result.iterations.max()) // 50
    assert op.matvecs == result.matvecs <= int(result.iterations.sum()) + 4 + looks
    torch.testing.assert_close(result.x, torch.linalg.solve(A, B), rtol=1e-6, atol=1e-6)


class OneStepLate:
    """What a look at flags of a GPU gives, on the CPU."""

    def __init__(self):
        self.previous = None

    def __call__(self, flags):
        seen, self.previous = self.previous, flags
        return torch.zeros_like(flags) if seen is None else seen


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_looking_one_step_late_costs_one_iteration_more(method, monkeypatch):
    A, Q = with_spectrum(POSITIVE)
    B = torch.stack([Q[:, 5], Q[:, 0] + Q[:, 60], Q.sum(1)], 1)
    prompt = solve(MatrixOperator(A), B, method=method, rtol=1e-9)
    monkeypatch.setattr(column_iteration, "LateLook", OneStepLate)
    late = solve(MatrixOperator(A), B, method=method, rtol=1e-9)
    assert late.converged.all()
    assert (late.iterations - prompt.iterations).max() <= 2
    torch.testing.assert_close(late.x, prompt.x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_consistent_singular_systems_are_solved(method):
    eigenvalues = torch.cat([torch.zeros(40, dtype=F64), torch.linspace(0.1, 3, 80, dtype=F64)])
    A, _ = with_spectrum(eigenvalues)
    B = A @ right_hand_sides(120)
    result = solve(MatrixOperator(A), B, method=method, rtol=1e-11)
    assert result.converged.all()
    least_norm = torch.linalg.pinv(A, rtol=1e-10, hermitian=True) @ B
    torch.testing.assert_close(result.x, least_norm, rtol=0, atol=1e-8)


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_a_good_preconditioner_saves_iterations(method):
    A, Q = with_spectrum(POSITIVE)
    B = right_hand_sides(120)
    noise = 0.8 + 0.4 * torch.rand(120, dtype=F64)
    M = MatrixOperator((Q * (noise / POSITIVE)) @ Q.T)
    plain = solve(MatrixOperator(A), B, method=method, rtol=1e-10)
    helped = solve(MatrixOperator(A), B, preconditioner=M, method=method, rtol=1e-10)
    assert helped.converged.all()
    assert 5 * int(helped.iterations.max()) < int(plain.iterations.max())
    torch.testing.assert_close(helped.x, torch.linalg.solve(A, B), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_negative_curvature_is_found_and_its_direction_returned(dtype):
    eigenvalues = torch.cat([torch.tensor([-1.0], dtype=F64), POSITIVE])
    A = with_spectrum(eigenvalues)[0].to(dtype)
    with pytest.warns(NotConvergedWarning, match=r"indefinite.*not positive definite: raise damp"):
        result = conjugate_gradient(MatrixOperator(A), right_hand_sides(121, 1)[:, 0].to(dtype))
    p = result.directions
    assert result.status == ("indefinite",)
    assert float(p.norm()) == pytest.approx(1)
    assert float(p @ A @ p) == pytest.approx(float(result.curvatures), rel=1e-3)
    assert float(result.curvatures) < 0


def test_residuals_are_true_where_recurrences_drift():
    A = with_spectrum(torch.logspace(-5, 0, 120, dtype=F64))[0].float()
    b = right_hand_sides(120, 1)[:, 0].float()
    with pytest.warns(NotConvergedWarning):
        result = conjugate_gradient(MatrixOperator(A), b, rtol=1e-7, max_iter=300)
    true = (b.double() - A.double() @ result.x.double()).norm()
    assert float(result.residual_norms) == pytest.approx(float(true), rel=0.2)


def test_a_hermitian_system_is_solved():
    Q = torch.linalg.qr(torch.randn(50, 50, dtype=torch.complex128))[0]
    A = (Q * torch.linspace(0.5, 2, 50)) @ Q.mH
    b = torch.randn(50, dtype=torch.complex128)
    for method in ("cg", "minres"):
        x = solve(MatrixOperator((A + A.mH) / 2), b, method=method, rtol=1e-12).x
        torch.testing.assert_close(x, torch.linalg.solve(A, b), rtol=1e-10, atol=1e-10)


def test_the_inverse_is_an_operator():
    A = with_spectrum(POSITIVE)[0]
    operator = pickle.loads(pickle.dumps(inverse(MatrixOperator(A), 0.1, rtol=1e-11)))
    exact = torch.linalg.inv(A + 0.1 * torch.eye(120, dtype=F64))
    torch.testing.assert_close(operator.to_dense(), exact, rtol=0, atol=1e-9)
    assert "inverse of MatrixOperator + 0.1 I by auto" in repr(operator)


def test_half_precision_operators_are_solved_to_their_noise():
    A = with_spectrum(torch.linspace(1, 3, 80, dtype=F64))[0].bfloat16()
    b = right_hand_sides(80, 1)[:, 0].bfloat16()
    result = solve(MatrixOperator(A), b)
    assert result.x.dtype == torch.float32
    assert (b.double() - A.double() @ result.x.double()).norm() <= 0.1 * b.double().norm()


def test_a_result_can_be_saved_and_loaded(tmp_path):
    result = solve(MatrixOperator(torch.eye(5)), torch.ones(5))
    result.save(tmp_path / "solution.safetensors")
    again = SolveResult.load(tmp_path / "solution.safetensors")
    assert torch.equal(again.x, result.x)
    assert again.status == ("converged",)
    assert "1 of 1 converged | minres" in repr(again)


EYE = MatrixOperator(torch.eye(4, dtype=F64))
NAN = MatrixOperator(torch.full((4, 4), torch.nan, dtype=F64))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "lu"}, OptionError, "unknown method 'lu'; choose one of auto, minres, cg"),
        ({"rtol": 0.0}, OptionError, "expected rtol between 0 and 1"),
        ({"max_iter": 0}, OptionError, "max_iter at least 1"),
        ({"damping": float("nan")}, OptionError, "expected a finite damping, got nan"),
        ({"preconditioner": MatrixOperator(torch.eye(4))}, VectorError, "preconditioner on the sp"),
        ({"preconditioner": -EYE}, OptionError, "positive definite preconditioner"),
        ({"preconditioner": -EYE, "method": "cg"}, OptionError, "positive definite precond"),
        ({"b": torch.ones(3, dtype=F64)}, VectorError, r"expected b of shape \(4,\) or \(4, k\)"),
        ({"op": NAN}, NonFiniteError, "hold NaN or infinity, by product"),
        ({"op": NAN, "method": "cg"}, NonFiniteError, "hold NaN or infinity"),
    ],
)
def test_what_cannot_be_solved_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        solve(**({"op": EYE, "b": torch.ones(4, dtype=F64)} | options))
