"""Every function of a matrix of Kronecker blocks is that of the dense matrix."""

import functools
import sys

import pytest
import torch

from torchlinop.errors import OptionError
from torchlinop.operators.eigenbasis import Eigenbasis, averaged_over_eigenspaces
from torchlinop.operators.kronecker import (
    KroneckerOperator,
    common_bases,
    diagonal_block,
    kronecker_sum,
)
from torchlinop.space import VectorSpace


def positive(size, seed):
    X = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return X @ X.T / size


def product(entries, pairs, dtype=torch.float64):
    return kronecker_sum(entries, pairs, common_bases(pairs), dtype)


INDICES = torch.tensor([18, 12, 14, 13, 17, 16, 15, 19])
PAIRS = [(positive(3, 0), positive(4, 1))]  # entries 0 to 11
OTHERS = [(positive(4, 2), positive(2, 3))]  # the entries INDICES
DIAGONAL = torch.tensor([0.5, 2.0], dtype=torch.float64)  # entries 20 and 21


@functools.cache
def operator(dtype=torch.float64):
    blocks = [
        product(slice(0, 12), PAIRS, dtype),
        product(INDICES, OTHERS, dtype),
        diagonal_block(slice(20, 22), DIAGONAL.to(dtype)),
    ]
    return KroneckerOperator(VectorSpace(22, dtype, torch.device("cpu")), blocks)


def one_block(block):
    eigenvalues = block.eigenvalues
    space = VectorSpace(eigenvalues.numel(), eigenvalues.dtype, eigenvalues.device)
    return KroneckerOperator(space, [block])


def assembled(first, second, diagonal):
    K = torch.zeros(22, 22, dtype=torch.float64)
    K[:12, :12] = first
    K[INDICES[:, None], INDICES] = second
    K[[20, 21], [20, 21]] = diagonal
    return K


@functools.cache
def dense():
    return assembled(torch.kron(*PAIRS[0]), torch.kron(*OTHERS[0]), DIAGONAL)


def relative(K, reference):
    return float((K - reference).abs().max() / reference.abs().max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("columns", [1, 5])
def test_products_are_those_of_the_dense_matrix(dtype, tolerance, columns):
    V = operator().space.random(columns, seed=3)
    assert relative(operator(dtype) @ V.to(dtype), dense() @ V) < tolerance


@pytest.mark.parametrize(
    ("function", "reference"),
    [
        (lambda K: K.trace(), lambda K: K.trace()),
        (lambda K: K.logdet(), lambda K: torch.linalg.slogdet(K).logabsdet),
        (lambda K: K.det(), torch.linalg.det),
        (lambda K: K.frobenius_norm(), lambda K: K.norm()),
    ],
    ids=["trace", "logdet", "det", "frobenius norm"],
)
def test_scalar_functions_are_those_of_the_dense_matrix(function, reference):
    # The smallest eigenvalues are 1e-5 of the largest, which det and logdet feel.
    assert float(function(operator())) == pytest.approx(float(reference(dense())), rel=1e-10)


def test_scalars_of_float32_blocks_are_summed_in_float64():
    K = operator(torch.float32)
    assert K.trace().dtype == K.logdet().dtype == K.frobenius_norm().dtype == torch.float64


@pytest.mark.parametrize("damping", [1e-2, 1.0, 1e3])
def test_the_inverse_is_exact(damping):
    V = operator().space.random(3, seed=4)
    inverse = operator().inverse(damping)
    reference = torch.linalg.solve(dense() + damping * torch.eye(22).double(), V)
    assert relative(inverse @ V, reference) < 1e-12
    assert relative(inverse @ (dense() @ V + damping * V), V) < 1e-12


def test_the_inverse_in_float32_is_as_exact_as_its_entries():
    V = operator().space.random(3, seed=4)
    reference = torch.linalg.solve(dense() + 1e-2 * torch.eye(22).double(), V)
    assert relative(operator(torch.float32).inverse(1e-2) @ V.float(), reference) < 1e-5


def pi_inverse(L, R, damping):
    pi = (L.trace() / len(L) / (R.trace() / len(R))).sqrt()
    I_L, I_R = torch.eye(len(L)).double(), torch.eye(len(R)).double()
    return torch.kron(
        torch.linalg.inv(L + pi * damping**0.5 * I_L), torch.linalg.inv(R + damping**0.5 / pi * I_R)
    )


def test_the_pi_split_damps_both_factors_and_whole_blocks_exactly():
    V = operator().space.random(3, seed=5)
    reference = assembled(
        pi_inverse(*PAIRS[0], 0.1), pi_inverse(*OTHERS[0], 0.1), 1 / (DIAGONAL + 0.1)
    )
    assert relative(operator().inverse(0.1, split="pi") @ V, reference @ V) < 1e-12


def test_a_zero_factor_is_damped_exactly_by_the_pi_split():
    zero = torch.zeros(2, 2, dtype=torch.float64)
    block = product(slice(0, 6), [(zero, positive(3, 0))])
    K = one_block(block)
    assert relative(K.inverse(0.5, split="pi").to_dense(), 2 * torch.eye(6).double()) < 1e-15


def test_a_sum_of_commuting_products_is_exact():
    Q = torch.linalg.eigh(positive(3, 7))[1]
    left = [(Q * torch.rand(3).double()) @ Q.T for _ in range(2)]
    right = [torch.rand(4).double() for _ in range(2)]  # diagonal
    block = product(slice(0, 12), list(zip(left, right, strict=True)))
    reference = sum(torch.kron(L, R.diag()) for L, R in zip(left, right, strict=True))
    assert relative(block.matmat(torch.eye(12).double()), reference) < 1e-12


def test_a_sum_of_other_products_keeps_trace_and_positivity_and_is_their_projection():
    pairs = [(positive(3, 8), positive(4, 9)), (positive(3, 10), positive(4, 11))]
    block = product(slice(0, 12), pairs)
    total = sum(torch.kron(L, R) for L, R in pairs)
    Q = torch.kron(block.left, block.right)
    assert relative(block.eigenvalues.flatten(), (Q.T @ total @ Q).diagonal()) < 1e-12
    assert float(block.eigenvalues.sum()) == pytest.approx(float(total.trace()), rel=1e-12)
    assert block.eigenvalues.min() >= 0


def test_means_over_an_eigenspace_do_not_depend_on_its_basis():
    w = torch.tensor([0.0, 1e-17, 1.0, 1.0, 2.0], dtype=torch.float64)
    M, turn = positive(5, 12), torch.linalg.qr(torch.randn(2, 2).double())[0]
    Q = torch.eye(5).double()
    Q[:2, :2], Q[2:4, 2:4] = turn, turn.T

    def means(Q):
        diagonal = (Q.T @ M @ Q).diagonal()[:, None]
        return averaged_over_eigenspaces(diagonal, Eigenbasis(Q, w), 0, 2.2e-16)

    assert relative(means(Q), means(torch.eye(5).double())) < 1e-14
    assert float(means(Q).sum()) == pytest.approx(float(M.trace()), rel=1e-14)
    assert means(Q)[4] == M[4, 4]


def test_a_saved_operator_is_loaded_as_the_same_matrix(tmp_path):
    operator().save(tmp_path / "K.safetensors")
    K = KroneckerOperator.load(tmp_path / "K.safetensors")
    for block, saved in zip(K.kronecker_blocks, operator().kronecker_blocks, strict=True):
        assert torch.equal(block.eigenvalues, saved.eigenvalues)
    reference = operator().inverse(0.1, split="pi").to_dense()
    assert relative(K.to_dense(), dense()) < 1e-12
    assert relative(K.inverse(0.1, split="pi").to_dense(), reference) < 1e-12
    assert "saved KroneckerOperator" in repr(K)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, r"written by \.save, got .* no header 'torchlinop' in JSON"),
        ({"torchlinop": "no JSON"}, "no header 'torchlinop' in JSON"),
        ({"torchlinop": "[1]"}, "no header 'torchlinop' in JSON"),
        ({"torchlinop": "{}"}, "operator of format 1 in .*, got something else of format None"),
        ({"torchlinop": '{"result": "Answer", "format": 1}'}, "got something else of format 1"),
        ({"torchlinop": '{"operator": "KFACOperator", "format": 2}'}, "KFACOperator of format 2"),
        ({"torchlinop": '{"operator": "K", "format": 1}'}, "incomplete .*'blocks'"),
        (
            {"torchlinop": '{"operator": "K", "format": 1, "blocks": [null]}'},
            "incomplete .*'entries'",
        ),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, metadata, message):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors", metadata=metadata)
    with pytest.raises(OptionError, match=message):
        KroneckerOperator.load(tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", ["text", "nothing", "."])
def test_what_is_no_safetensors_file_is_refused(tmp_path, name):
    (tmp_path / "text").write_text("some text, longer than a header")
    with pytest.raises(OptionError, match=r"cannot read .* as a safetensors file"):
        KroneckerOperator.load(tmp_path / name)


def test_a_path_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(OptionError, match=r"cannot write .* in a directory that exists"):
        operator().save(tmp_path / "missing" / "K.safetensors")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(tmp_path, device):
    operator().save(tmp_path / "K.safetensors")
    with pytest.raises(OptionError, match=f"a device of this machine, got '{device}'"):
        KroneckerOperator.load(tmp_path / "K.safetensors", device)


def test_without_safetensors_the_line_to_run_is_given(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(OptionError, match="run: pip install safetensors"):
        operator().save(tmp_path / "K.safetensors")


@pytest.mark.parametrize(
    ("damping", "split", "message"),
    [
        (0.1, "half", "unknown split 'half'; choose one of exact, pi"),
        (-1.0, "exact", "expected damping to be at least 0, got -1; pass"),
        (-1.0, "pi", "expected damping to be at least 0, got -1; pass"),
        (float("nan"), "exact", "expected damping to be a finite real number, got nan; pass"),
        (float("inf"), "exact", "expected damping to be a finite real number, got inf"),
        ("a", "exact", "expected damping to be a finite real number, got 'a'"),
        (1j, "exact", "expected damping to be a finite real number, got 1j"),
    ],
)
def test_inverses_that_do_not_exist_are_refused(damping, split, message):
    with pytest.raises(OptionError, match=message):
        operator().inverse(damping, split=split)


@pytest.mark.parametrize("split", ["exact", "pi"])
def test_a_damping_whose_inverse_overflows_is_refused(split):
    factor = torch.diag(torch.tensor([1.0, 0.0])).double()
    K = one_block(product(slice(0, 4), [(factor, factor)], torch.float32))
    message = "invertible in torch.float32, got 1e-40, which leaves an eigenvalue of 1e-40"
    with pytest.raises(OptionError, match=message):
        K.inverse(1e-40, split=split)
    wide = one_block(product(slice(0, 4), [(factor, factor)]))
    assert float(wide.inverse(1e-40, split=split).to_dense()[3, 3]) == pytest.approx(1e40)


def test_an_eigenvalue_that_rounding_left_below_zero_is_not_inverted():
    K = one_block(diagonal_block(slice(0, 2), torch.tensor([1.0, -1e-20])))
    with pytest.raises(OptionError, match="leaves an eigenvalue of 0"):
        K.inverse(0.0)
    assert relative(K.inverse(1e-3).to_dense().double(), torch.tensor([[1, 0], [0, 1e3]])) < 1e-3


def test_the_inverse_says_of_what_and_how_it_was_damped():
    assert 'inverse of KroneckerOperator + 0.1 I, split="pi"' in repr(
        operator().inverse(0.1, split="pi")
    )


def test_a_singular_matrix_has_no_inverse_without_damping_and_no_logarithm():
    K = one_block(diagonal_block(slice(0, 2), torch.tensor([1.0, 0.0])))
    with pytest.raises(OptionError, match=r"got 0, which leaves an eigenvalue of 0; pass damping"):
        K.inverse(0.0)
    with pytest.raises(OptionError, match="two Kronecker factors, which KroneckerOperator does"):
        K.inverse(0.1, split="pi")
    assert float(K.logdet()) == -float("inf")
    assert float(K.det()) == 0
