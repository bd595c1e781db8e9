"""Blocks of an operator, and operators made of blocks, are those of its dense matrix."""

import pickle

import pytest
import torch
from torch import nn

from torchlinop import CountingOperator, HessianOperator, MatrixOperator, match_names
from torchlinop.errors import NoParametersError, OptionError, VectorError
from torchlinop.operators import blocks as blocks_module
from torchlinop.operators.blocks import BlockDiagonalOperator
from torchlinop.parameters import ParameterLayout
from torchlinop.testing import gallery


def symmetric(n, seed=0):
    M = torch.randn(n, n, generator=torch.Generator().manual_seed(seed)).double()
    return M + M.T


def hessian():
    p = gallery.mlp()
    return HessianOperator(p.model, p.batches, p.loss_fn)


def kind(name, slot):
    return "weights" if len(slot.shape) > 1 else "biases"


# Groupings of the parameters 0.weight (5, 6), 0.bias (5,), 2.weight (3, 5), 2.bias (3,).
GROUPINGS = [
    (
        "parameter",
        {
            "0.weight": range(30),
            "0.bias": range(30, 35),
            "2.weight": range(35, 50),
            "2.bias": range(50, 53),
        },
    ),
    ("module", {"0": range(35), "2": range(35, 53)}),
    (kind, {"weights": [*range(30), *range(35, 50)], "biases": [*range(30, 35), 50, 51, 52]}),
]


@pytest.mark.parametrize(("by", "rows"), GROUPINGS)
def test_blocks_are_the_diagonal_blocks_of_the_dense_matrix_in_the_order_of_the_layout(by, rows):
    H = hessian()
    dense, blocks = H.to_dense(), H.blocks(by)
    assert list(blocks) == list(rows)
    for name, block in blocks.items():
        I = list(rows[name])  # noqa: E741
        torch.testing.assert_close(block.to_dense(), dense[I][:, I], rtol=1e-12, atol=1e-15)


def test_parameters_without_entries_are_no_blocks():
    model = nn.Linear(3, 2)
    model.empty = nn.Parameter(torch.zeros(0))
    H = HessianOperator(model, torch.ones(1, 3), lambda m, x: m(x).square().sum() + m.empty.sum())
    assert list(H.blocks()) == ["weight", "bias"]
    torch.testing.assert_close(BlockDiagonalOperator.of(H).to_dense()[:6, :6], H.to_dense()[:6, :6])


def test_a_block_keeps_the_names_of_its_parameters():
    block = hessian().blocks("module")["2"]
    assert block.layout.names == ("2.weight", "2.bias")
    assert block.restrict(match_names("*.bias")).size == 3
    assert list(block.blocks()) == ["2.weight", "2.bias"]


def test_parameters_of_the_model_itself_belong_to_the_root():
    model = nn.Linear(3, 2).double()
    H = HessianOperator(model, [torch.ones(1, 3).double()], lambda m, x: m(x).square().sum())
    assert list(H.blocks("module")) == ["(root)"]


def test_a_tied_parameter_is_in_the_block_of_its_first_name():
    p = gallery.tied()
    H = HessianOperator(p.model, p.batches, p.loss_fn)
    assert list(H.blocks("module")) == ["embed", "mix"]


@pytest.mark.parametrize(("by", "rows"), GROUPINGS)
def test_the_block_diagonal_part_is_the_dense_matrix_with_zeros_elsewhere(by, rows):
    H = hessian()
    dense, expected = H.to_dense(), torch.zeros(53, 53).double()
    for I in map(torch.tensor, map(list, rows.values())):  # noqa: E741
        expected[I[:, None], I] = dense[I[:, None], I]
    D = BlockDiagonalOperator.of(H, by)
    V = D.space.random(3)
    torch.testing.assert_close(D @ V, expected @ V, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(D @ V[:, 0], expected @ V[:, 0], rtol=1e-12, atol=1e-14)
    assert D.layout == H.layout


def test_the_block_diagonal_part_takes_all_blocks_in_one_pass():
    counted = CountingOperator(hessian())
    D = BlockDiagonalOperator.of(counted)
    D @ D.space.random(3)
    assert (counted.matvecs, counted.matmats) == (4 * 3, 1)


def test_blocks_are_taken_in_as_many_passes_as_memory_asks_for(monkeypatch):
    counted = CountingOperator(hessian())
    D = BlockDiagonalOperator.of(counted)
    V = D.space.random(3)
    expected = D @ V
    # A column with its product and buffers is 4 * 53 * 8 bytes: six columns fit into half.
    monkeypatch.setattr(blocks_module, "free_bytes", lambda device: 2 * 6 * 4 * 53 * 8)
    torch.testing.assert_close(D @ V, expected, rtol=1e-12, atol=1e-14)
    assert counted.matmats == 1 + 2


A, B = symmetric(2, seed=1), symmetric(3, seed=2)
PARTITIONS = [
    ([0, 1], [2, 3, 4]),
    (slice(0, 2), slice(2, 5)),
    ([4, 0], [2, 6, 3]),
    (slice(5, 7), slice(0, 5, 2)),
    (slice(5, None), slice(3, 0, -1)),
]


@pytest.mark.parametrize(("first", "second"), PARTITIONS)
def test_operators_on_parts_are_one_matrix_with_zeros_elsewhere(first, second):
    expected = torch.zeros(7, 7).double()
    for where, block in ((first, A), (second, B)):
        I = torch.arange(7)[where] if isinstance(where, list) else torch.tensor(range(7)[where])  # noqa: E741
        expected[I[:, None], I] = block
    rows = [torch.tensor(w) if isinstance(w, list) else w for w in (first, second)]
    D = BlockDiagonalOperator(7, [(rows[0], MatrixOperator(A)), (rows[1], MatrixOperator(B))])
    torch.testing.assert_close(D.to_dense(), expected, rtol=1e-15, atol=0)
    torch.testing.assert_close(D @ torch.ones(7).double(), expected.sum(1))
    assert "2 blocks on 5 of 7 rows" in repr(D)


def test_block_diagonal_operators_survive_pickling():
    D = BlockDiagonalOperator.of(hessian(), "module")
    v = torch.ones(53).double()
    torch.testing.assert_close(pickle.loads(pickle.dumps(D)) @ v, D @ v)


LAYOUT = ParameterLayout.of(nn.Linear(3, 2))  # of 8 entries


def two(first, second):
    return BlockDiagonalOperator(7, [(first, MatrixOperator(A)), (second, MatrixOperator(B))])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: two(slice(0, 2), slice(1, 4)), "block 1 has a row twice, or one of an earlier"),
        (lambda: two(torch.tensor([3, 3]), slice(4, 7)), "block 0 has a row twice"),
        (lambda: two(slice(0, 3), slice(3, 6)), "expected 2 rows for block 0.*got 3 of 7"),
        (
            lambda: two(slice(0, 2), slice(5, 8)),
            "expected 3 rows for block 1.*got 2 of 7; pass as many as the operator has",
        ),
        (lambda: two([0, 1], slice(2, 5)), r"block 0, got a list; pass torch.tensor\(rows\)"),
        (
            lambda: two(torch.tensor([0, 7]), slice(1, 4)),
            r"expected int64 indices \(m,\) from 0 to 6 for block 0",
        ),
        (lambda: two(torch.ones(7).bool(), slice(1, 4)), "got torch.bool of shape"),
        (
            lambda: BlockDiagonalOperator(
                5, [(slice(2), MatrixOperator(A)), (slice(2, 5), MatrixOperator(B.float()))]
            ),
            "torch.float64 on cpu, got torch.float32 on cpu in block 1; build all blocks alike",
        ),
        (
            lambda: BlockDiagonalOperator(4, [(slice(2), MatrixOperator(A))], layout=LAYOUT),
            "expected a layout of 4 entries, got one of 8; pass",
        ),
        (lambda: BlockDiagonalOperator(5, []), "expected at least one block, got none"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(build, message):
    with pytest.raises(VectorError, match=message):
        build()


def test_blocks_need_named_parameters():
    with pytest.raises(NoParametersError, match="MatrixOperator has no named parameters to group"):
        MatrixOperator(A).blocks()


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ("layer", r"unknown grouping by='layer'; choose one of parameter, module, or a function"),
        (None, r"unknown grouping by=None; choose one of parameter, module"),
        (str.upper, r"unknown grouping by=<method 'upper'.*; .* or a function \(name, slot\) ->"),
        (lambda name, slot: None, "expected by.*to return a label, a string, got None for '0.wei"),
    ],
)
def test_unknown_groupings_are_refused(by, message):
    with pytest.raises(OptionError, match=message):
        hessian().blocks(by)
