"""Every operator on the device, in every precision, against dense answers found on the CPU."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from on_device import DEVICE, anywhere, moved, only_cuda, relative
from torch import nn

import torchlinop
from torchlinop import (
    BlockDiagonalOperator,
    CountingOperator,
    DiagonalOperator,
    EKFACOperator,
    EmpiricalFisherOperator,
    FisherOperator,
    GGNOperator,
    GradientCovarianceOperator,
    GradientOuterOperator,
    HessianOperator,
    JacobianOperator,
    KFACOperator,
    LambdaOperator,
    MatrixOperator,
    ggn_diagonal,
)
from torchlinop.testing import RotatedOperator, gallery
from torchlinop.testing.oracles import (
    dense_empirical_fisher,
    dense_ggn,
    dense_hessian,
    dense_jacobian,
)

pytestmark = anywhere

# Of the largest entry. bfloat16 rounds weights, activations and their tangents by 2^-9 each.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1}
PROBLEMS = {"mlp": gallery.mlp, "cnn": gallery.cnn, "gpt2": gallery.gpt2, "llama": gallery.llama}
FEED_FORWARD = ("mlp", "cnn")
ours = nn.CrossEntropyLoss


@functools.cache
def problem(name, dtype):
    """On the CPU, in float64, of what rounding to ``dtype`` leaves."""
    return moved(moved(PROBLEMS[name](), dtype, "cpu"), torch.float64, "cpu")


def terms(p):
    return F.cross_entropy(p.outputs(), p.full_batch[1], reduction="none")


def hessian(p):
    return dense_hessian(p.full_loss, p.parameters)


def ggn(p):
    return dense_ggn(p.loss_of_outputs, p.outputs, p.parameters)


def empirical_fisher(p):
    return dense_empirical_fisher(lambda: terms(p), 1 / len(p.full_batch[1]), p.parameters)


def gradient(p):
    return dense_jacobian(p.full_loss, p.parameters)[0]


def gradient_outer(p):
    return torch.outer(gradient(p), gradient(p))


@functools.cache
def answer(oracle, name, dtype):
    """A dense matrix, found once."""
    return oracle(problem(name, dtype))


def on_outputs(operator, **options):
    return lambda p: operator(p.model, p.batches, p.forward_fn, ours(), **options)


def of_loss(operator, **options):
    return lambda p, **more: operator(p.model, p.batches, p.loss_fn, **options, **more)


def next_tokens(batch):
    """How many a language model is judged by. Half precision hides what the loss is a mean over."""
    return int((batch["labels"][:, 1:] != -100).sum())


def jacobian(p):
    return JacobianOperator(p.model, p.batches, p.forward_fn)


HESSIANS = {
    "kept": of_loss(HessianOperator, linearization="keep"),
    "rebuilt": of_loss(HessianOperator, linearization="rebuild"),
    "forward over reverse": of_loss(HessianOperator, method="forward_over_reverse"),
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("way", HESSIANS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_hessian_is_the_dense_one(name, way, dtype):
    if way == "forward over reverse" and name == "llama":
        pytest.skip("silu has no forward derivative of its backward")
    p = problem(name, dtype)
    weight = {} if name in FEED_FORWARD else {"weight": next_tokens}
    H = HESSIANS[way](moved(p, dtype), **weight)
    V = H.space.random(3)
    assert V.device == DEVICE
    exact = answer(hessian, name, dtype) @ V.double().cpu()
    assert relative(H @ V, exact) <= TOLERANCES[dtype]


@pytest.mark.parametrize("name", FEED_FORWARD)
def test_hessian_by_finite_differences_is_the_dense_one_to_half_the_digits(name):
    p = problem(name, torch.float64)
    H = of_loss(HessianOperator, method="finite_difference")(moved(p))
    V = H.space.random(2)
    assert relative(H @ V, answer(hessian, name, torch.float64) @ V.cpu()) <= 1e-6


MATRICES = {
    "GGN": (on_outputs(GGNOperator), ggn),
    "GGN, loss by autograd": (on_outputs(GGNOperator, loss_hvp="autograd"), ggn),
    "GGN, rebuilt": (on_outputs(GGNOperator, linearization="rebuild"), ggn),
    "Fisher": (on_outputs(FisherOperator), ggn),
    "empirical Fisher": (on_outputs(EmpiricalFisherOperator), empirical_fisher),
    "empirical Fisher of samples": (of_loss(EmpiricalFisherOperator), empirical_fisher),
    "gradient covariance": (
        of_loss(GradientCovarianceOperator),
        lambda p: empirical_fisher(p) - gradient_outer(p),
    ),
    "gradient outer product": (of_loss(GradientOuterOperator), gradient_outer),
    "diagonal of the GGN": (on_outputs(ggn_diagonal), lambda p: ggn(p).diagonal().diag()),
}


@pytest.mark.parametrize("name", FEED_FORWARD)
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_matrix_of_a_model_is_the_dense_one(name, matrix, dtype):
    build, oracle = MATRICES[matrix]
    A = build(moved(problem(name, dtype), dtype))
    V = A.space.random(3)
    assert A.device == V.device == DEVICE
    exact = answer(oracle, name, dtype) @ V.double().cpu()
    assert relative(A @ V, exact) <= TOLERANCES[dtype]


@pytest.mark.parametrize("name", FEED_FORWARD)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_jacobian_and_its_transpose_are_the_dense_ones(name, dtype):
    p = problem(name, dtype)
    A, J = jacobian(moved(p, dtype)), dense_jacobian(p.outputs, p.parameters)
    V, U = A.space.random(2), A.rows.random(2)
    assert relative(A @ V, J @ V.double().cpu()) <= TOLERANCES[dtype]
    assert relative(A.T @ U, J.T @ U.double().cpu()) <= TOLERANCES[dtype]


# Drawn or projected, these have no closed form: the same operator on the CPU, in float64.
ON_THE_CPU = {
    "Fisher, drawn": on_outputs(FisherOperator, mc_samples=2),
    "K-FAC": on_outputs(KFACOperator, unsupported="diag"),
    "K-FAC, drawn": on_outputs(KFACOperator, fisher_type="mc", unsupported="diag"),
    "EKFAC": on_outputs(EKFACOperator, unsupported="diag"),
}


@pytest.mark.parametrize("name", FEED_FORWARD)
@pytest.mark.parametrize("matrix", ON_THE_CPU)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_matrix_is_that_of_the_cpu(name, matrix, dtype):
    p = problem(name, dtype)
    build = ON_THE_CPU[matrix]
    A = build(moved(p, dtype))
    assert A.device == DEVICE
    assert relative(A.to_dense(), build(p).to_dense()) <= 10 * TOLERANCES[dtype]


def symmetric(n=40, dtype=torch.float64):
    M = torch.randn(n, n, dtype=torch.float64)
    return (M + M.T).to(dtype)


EXPLICIT = {
    "matrix": (lambda M: MatrixOperator(M), lambda M: M),
    "function": (
        lambda M: LambdaOperator(len(M), lambda v: M @ v, dtype=M.dtype, device=M.device),
        lambda M: M,
    ),
    "diagonal": (lambda M: DiagonalOperator(M.diagonal()), lambda M: M.diagonal().diag()),
    "counted": (lambda M: CountingOperator(MatrixOperator(M)), lambda M: M),
    "combination": (
        lambda M: 2.0 * MatrixOperator(M) - DiagonalOperator(M.diagonal()),
        lambda M: 2 * M - M.diagonal().diag(),
    ),
    "shift": (lambda M: MatrixOperator(M).shift(0.5), lambda M: M + torch.eye(len(M)) / 2),
    "blocks": (
        lambda M: BlockDiagonalOperator(
            len(M), [(slice(0, 25), MatrixOperator(M[:25, :25])),
                     (slice(25, 40), MatrixOperator(M[25:, 25:]))]
        ),
        lambda M: torch.block_diag(M[:25, :25], M[25:, 25:]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", EXPLICIT)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_operator_of_given_entries_is_its_matrix(kind, dtype):
    build, oracle = EXPLICIT[kind]
    M = symmetric(dtype=dtype)
    A = build(M.to(DEVICE))
    V = A.space.random(3)
    exact = oracle(M.double()) @ V.double().cpu()
    # Sums of 40 products, rounded to the dtype.
    assert relative(A @ V, exact) <= 40 * torch.finfo(dtype).eps


def test_restriction_is_the_block_of_its_rows():
    M, rows = symmetric(), torch.tensor([3, 30, 7])
    A = MatrixOperator(M.to(DEVICE)).restrict(rows.to(DEVICE))
    torch.testing.assert_close(A.to_dense().cpu(), M[rows][:, rows])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rotated_operator_has_its_eigenvalues(dtype):
    values = torch.linspace(-1, 3, 50, dtype=dtype)
    found = torch.linalg.eigvalsh(RotatedOperator(values.to(DEVICE)).to_dense())
    assert relative(found, values) <= 100 * torch.finfo(dtype).eps


def test_batches_on_the_host_are_moved():
    p = problem("mlp", torch.float64)
    H = HessianOperator(copy.deepcopy(p.model).to(DEVICE), p.batches, p.loss_fn)
    V = H.space.random(2)
    assert relative(H @ V, hessian(p) @ V.cpu()) <= TOLERANCES[torch.float64]


@pytest.mark.parametrize("make", [gallery.recurrent, gallery.transformer, gallery.convolutions])
def test_hessian_of_other_architectures_is_the_dense_one(make):
    p = make()
    H = of_loss(HessianOperator)(moved(p))
    V = H.space.random(2)
    assert relative(H @ V, hessian(p) @ V.cpu()) <= 1e-9


@only_cuda
def test_random_states_of_the_device_are_left_alone():
    p = moved(gallery.cnn())
    before = torch.cuda.get_rng_state()
    H = HessianOperator(p.model, p.batches, p.loss_fn, mode="train", linearization="rebuild")
    H @ H.space.random(2)
    assert torch.equal(before, torch.cuda.get_rng_state())


def test_every_operator_of_the_library_is_judged_here():
    public = {name for name in torchlinop.__all__ if name.endswith("Operator")}
    assert public - set(globals()) == {"CurvatureOperator"}
