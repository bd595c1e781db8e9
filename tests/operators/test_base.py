"""Sums, multiples, shifts, restrictions, counts and checks of operators are those of matrices."""

import pickle

import pytest
import torch

from torchlinop import (
    CountingOperator,
    HessianOperator,
    LambdaOperator,
    MatrixOperator,
    match_names,
)
from torchlinop.errors import (
    NonFiniteError,
    NoParametersError,
    OptionError,
    ProductBudgetError,
    SymmetryError,
    VectorError,
)
from torchlinop.testing import gallery


def symmetric(n=6, seed=0):
    M = torch.randn(n, n, generator=torch.Generator().manual_seed(seed)).double()
    return M + M.T


M, N = symmetric(seed=1), symmetric(seed=2)
A, B = MatrixOperator(M), MatrixOperator(N)
EYE = torch.eye(6).double()

EXPRESSIONS = [
    (A + B, M + N),
    (A - B, M - N),
    (2 * A, 2 * M),
    (A * 0.5, M / 2),
    (A / 4, M / 4),
    (-A, -M),
    (A.shift(3), M + 3 * EYE),
    (2 * (A - B / 2).shift(1) + A, 3 * M - N + 2 * EYE),
    (LambdaOperator(6, lambda v: M @ v, dtype=torch.float64), M),
    (LambdaOperator(6, lambda v: M @ v, matmat=lambda V: M @ V, dtype=torch.float64), M),
    (A.restrict(torch.tensor([4, 0, 2])), M[[4, 0, 2]][:, [4, 0, 2]]),
    (CountingOperator(A), M),
]


@pytest.mark.parametrize(("operator", "matrix"), EXPRESSIONS)
def test_an_expression_of_operators_is_that_of_matrices(operator, matrix):
    V = torch.randn(operator.size, 3).double()
    torch.testing.assert_close(operator @ V, matrix @ V)
    torch.testing.assert_close(operator @ V[:, 0], matrix @ V[:, 0])
    torch.testing.assert_close(operator.to_dense(chunk=4), matrix)


@pytest.mark.parametrize(("operator", "matrix"), EXPRESSIONS)
def test_products_are_new_memory(operator, matrix):
    v = torch.ones(operator.size).double()
    first, second = operator @ v, operator @ v
    first.fill_(torch.nan)
    torch.testing.assert_close(second, matrix.sum(1))
    torch.testing.assert_close(operator @ v, matrix.sum(1))
    assert torch.equal(v, torch.ones_like(v))


def test_an_operator_that_hands_its_input_through_gives_a_copy():
    identity = LambdaOperator(6, lambda v: v, dtype=torch.float64)
    v = torch.ones(6).double()
    (identity @ v).fill_(2)
    assert torch.equal(v, torch.ones_like(v))


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("columns", [1, 3])
def test_a_product_may_be_a_double_backward_pass_wherever_it_is_called(context, columns):
    theta = torch.linspace(-1, 1, 6, dtype=torch.float64).requires_grad_()

    def hessian_times(v):
        gradient = torch.autograd.grad(theta.pow(4).sum() / 12, theta, create_graph=True)[0]
        return torch.autograd.grad(gradient, theta, v, create_graph=True)[0]

    H = LambdaOperator(6, hessian_times, dtype=torch.float64)
    with context():
        AV = H @ torch.ones(6, columns, dtype=torch.float64)
    assert not AV.requires_grad
    torch.testing.assert_close(AV, theta.detach().square()[:, None].expand(6, columns))


def test_a_hessian_that_is_the_identity_gives_a_copy():
    model = torch.nn.Linear(3, 1, bias=False).double()
    H = HessianOperator(model, [torch.ones(1, 1)], lambda m, b: m.weight.pow(2).sum() / 2)
    v = torch.ones(3).double()
    (H @ v).fill_(2)
    assert torch.equal(H @ v, v)


def test_complex_hermitian_matrices_are_operators():
    C = torch.randn(4, 4, dtype=torch.complex128)
    C = C + C.mH
    op = MatrixOperator(C)
    v = torch.randn(4, dtype=torch.complex128)
    torch.testing.assert_close(op.shift(2) @ v, C @ v + 2 * v)
    assert op.check().ok


def test_a_block_without_columns_has_a_product_without_columns():
    assert (A @ torch.empty(6, 0).double()).shape == (6, 0)


def test_restriction_by_filter_is_the_block_and_keeps_the_names():
    p = gallery.mlp()
    H = HessianOperator(p.model, p.batches, p.loss_fn)
    block = H.restrict(match_names("0.bias", "2.weight"))
    rows = [*range(30, 50)]
    torch.testing.assert_close(block.to_dense(), H.to_dense()[rows][:, rows])
    named = block.layout.unflatten(torch.arange(20.0))
    assert {k: v.shape for k, v in named.items()} == {"0.bias": (5,), "2.weight": (3, 5)}
    assert block.restrict(match_names("2.*")).size == 15


def test_restriction_keeps_the_names_of_tied_tensors():
    p = gallery.tied()
    H = HessianOperator(p.model, p.batches, p.loss_fn)
    status = H.restrict(match_names("mix.*")).layout.status
    assert status["embed.weight"] == status["head.weight"] == "filtered out"


def test_the_dense_matrix_needs_a_chunk():
    with pytest.raises(OptionError, match="expected chunk to be at least 1, got 0"):
        A.to_dense(0)


def test_sums_keep_the_layout_for_restriction():
    p = gallery.mlp()
    H = HessianOperator(p.model, p.batches, p.loss_fn)
    assert (H + 2 * H).restrict(match_names("2.*")).size == 18


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda: A @ torch.ones(5).double(), r"expected a vector of shape \(6,\), got \(5,\)"),
        (
            lambda: A @ torch.ones(5, 2).double(),
            r"expected a block of shape \(6, k\), got \(5, 2\)",
        ),
        (lambda: A.matmat(torch.ones(6).double()), r"expected a block of shape \(6, k\)"),
        (
            lambda: A @ torch.ones(6),
            "expected torch.float64 on cpu, got torch.float32 on cpu; pass",
        ),
        (lambda: A @ torch.ones(6, device="meta").double(), "on cpu, got torch.float64 on meta"),
        (lambda: A + MatrixOperator(symmetric(5)), "expected operators on one space"),
        (lambda: A + MatrixOperator(M.float()), "expected operators on one space"),
        (lambda: MatrixOperator(torch.ones(2, 3)), r"expected a square matrix, got shape \(2, 3\)"),
        (lambda: MatrixOperator(torch.ones(2, 2).long()), "expected floating-point entries"),
        (
            lambda: A.restrict(torch.tensor([0, 6])),
            "distinct indices from 0 to 5, got 2 from 0 to 6",
        ),
        (lambda: A.restrict(torch.tensor([1, 1])), r"\(1 distinct\)"),
        (lambda: A.restrict(torch.tensor([True, False])), "expected a non-empty int64 tensor"),
        (
            lambda: LambdaOperator(3, lambda v: v[:2]) @ torch.ones(3),
            r"expected the product to return torch.float32 of shape \(3, 1\)",
        ),
        (
            lambda: LambdaOperator(3, lambda v: v.mul_(2)) @ torch.ones(3),
            "wrote into its argument.*return a new tensor",
        ),
        (
            lambda: LambdaOperator(3, lambda v: v.mul_(2)) @ torch.ones(3, 2),
            "wrote into its argument.*return a new tensor",
        ),
    ],
)
def test_what_does_not_fit_is_refused_naming_both_sides(operation, message):
    with pytest.raises(VectorError, match=message):
        operation()


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda: A.restrict([0, 1]), r"tensor of indices, got \[0, 1\]; pass match_names"),
        (lambda: A.restrict("0.weight"), "expected a filter of parameters.*got '0.weight'"),
        (lambda: A.shift("a"), "expected sigma to be a finite real number, got 'a'"),
        (lambda: A * float("nan"), "expected factor to be a finite real number, got nan"),
        (lambda: A.shift(1j), "expected sigma to be a finite real number, got 1j"),
        (lambda: A.shift(float("nan")), "expected sigma to be a finite real number, got nan"),
    ],
)
def test_arguments_of_another_kind_are_refused(operation, message):
    with pytest.raises(OptionError, match=message):
        operation()


def test_a_tensor_of_one_entry_shifts_as_its_number():
    assert torch.equal(A.shift(torch.tensor(2.0)).to_dense(), A.shift(2).to_dense())


def test_filters_need_named_parameters():
    with pytest.raises(NoParametersError, match="MatrixOperator has no named parameters to filter"):
        A.restrict(match_names("*"))
    p = gallery.mlp()
    H = HessianOperator(p.model, p.batches, p.loss_fn)
    with pytest.raises(NoParametersError, match="selects none of the operator's 4 tensors"):
        H.restrict(match_names("nothing"))


@pytest.mark.parametrize("other", [1.0, "a", None, torch.ones(2)])
def test_sums_with_other_things_are_type_errors(other):
    with pytest.raises(TypeError):
        A + other


def test_counts_are_of_columns_and_of_calls():
    counted = CountingOperator(A)
    counted @ torch.ones(6).double()
    counted @ torch.ones(6, 3).double()
    assert (counted.matvecs, counted.matmats) == (4, 2)


def test_the_product_beyond_the_budget_is_refused_and_not_taken():
    counted = CountingOperator(A, max_matvecs=4)
    counted @ torch.ones(6, 3).double()
    with pytest.raises(ProductBudgetError, match="3 of 4 products are used up, and 2 more"):
        counted @ torch.ones(6, 2).double()
    assert counted.matvecs == 3


@pytest.mark.parametrize(
    "options", [{}, {"weighting": "batch-mean"}, {"method": "forward_over_reverse"}]
)
def test_a_hessian_survives_pickling(options):
    p = gallery.mlp()
    H = HessianOperator(p.model, p.batches, p.loss_fn, param_filter=match_names("2.*"), **options)
    v = torch.ones(18).double()
    expected = H @ v
    torch.testing.assert_close(pickle.loads(pickle.dumps(H)) @ v, expected)


def test_repr_is_one_line_with_facts():
    p = gallery.mlp()
    H = HessianOperator(p.model, p.batches, p.loss_fn)
    assert repr(H) == (
        "<HessianOperator 53x53 float64 cpu | Sequential, 4 of 4 tensors | 23 samples in 3 "
        "batches, mean over samples | eval mode | autograd, kept>"
    )
    assert repr(2 * H) == "<LinearCombination 53x53 float64 cpu | 2 HessianOperator>"
    assert repr(H.shift(3)) == "<LinearCombination 53x53 float64 cpu | HessianOperator + 3 I>"


@pytest.mark.parametrize(
    ("operator", "written"),
    [
        (A - B, "MatrixOperator - MatrixOperator"),
        (-A, "-MatrixOperator"),
        (-2 * A, "-2 MatrixOperator"),
        (A.shift(-0.5), "MatrixOperator - 0.5 I"),
        (A.shift(0), "MatrixOperator"),
    ],
)
def test_a_linear_combination_is_written_with_its_signs(operator, written):
    assert repr(operator) == f"<LinearCombination 6x6 float64 cpu | {written}>"


def wrong(kind):
    """Operators with one defect each."""
    calls = []

    def product(v):
        calls.append(v)
        if kind == "asymmetric":
            return M @ v + 1e-8 * torch.triu(M, 1) @ v
        if kind == "random":
            return M @ v + 1e-6 * len(calls) * v
        if kind == "affine":
            return M @ v + 1
        return M @ v / 0

    return LambdaOperator(6, product, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("asymmetric", SymmetryError, r"\|<u,Av>-<v,Au>\| = \de-"),
        ("random", SymmetryError, r"repeatability \de-0"),
        ("affine", SymmetryError, "linearity defect"),
        ("infinite", NonFiniteError, "hold NaN or infinity"),
    ],
)
@pytest.mark.filterwarnings("ignore::torchlinop.errors.PrecisionWarning")
def test_check_names_the_defect(kind, error, message):
    assert not wrong(kind).check().ok
    assert "FAILED" in repr(wrong(kind).check())
    with pytest.raises(error, match=message):
        wrong(kind).check(strict=True)


def test_check_of_a_right_operator_is_ok_and_measures_its_norm():
    report = A.check()
    assert report.ok
    assert report.noise < 1e-14
    largest = float(torch.linalg.eigvalsh(M).abs().max())
    assert 0.3 * largest < report.norm <= largest * (1 + 1e-12)
    assert repr(report).startswith("CheckReport  ok")


def test_check_reports_parameters_modules_and_memory():
    p = gallery.tied()
    p.model.mix.bias.requires_grad_(False)
    H = HessianOperator(p.model, p.batches, p.loss_fn)
    text = repr(H.check())
    assert (
        "parameters: 2 selected; 1 frozen (mix.bias); 1 tied (head.weight = embed.weight)" in text
    )
    assert "modules: 0 with Dropout and 0 with running statistics, in eval mode" in text
    assert "memory: 352 bytes a vector" in text  # 44 numbers of 8 bytes


def test_check_of_the_zero_matrix_is_ok():
    assert MatrixOperator(torch.zeros(4, 4)).check().ok
