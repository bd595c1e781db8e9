"""Block coupling is the ratio of the norms of row blocks, and tells noise from a linear map."""

import itertools

import pytest
import torch
from torch import nn

from torchlinop import CountingOperator, HessianOperator, LambdaOperator, MatrixOperator
from torchlinop.algorithms.block_coupling import BlockCoupling, block_coupling
from torchlinop.errors import NonFiniteError, NoParametersError, OptionError
from torchlinop.operators import blocks as blocks_module
from torchlinop.parameters import ParameterLayout
from torchlinop.testing import gallery
from torchlinop.testing.oracles import dense_hessian

SIZES = (1, 4, 10, 25)  # of the blocks "0", "1", "2", "3"
DISTRIBUTIONS = ["gaussian", "rademacher", "sphere"]


def named(operator, sizes=SIZES):
    """The operator with these many entries in each of several parameters."""
    parameters = [nn.Parameter(torch.zeros(size, dtype=operator.dtype)) for size in sizes]
    operator.layout = ParameterLayout.of(nn.ParameterList(parameters))
    return operator


def symmetric(n=40, seed=0):
    M = torch.randn(n, n, generator=torch.Generator().manual_seed(seed)).double()
    return M + M.T


def row_blocks(M, sizes=SIZES):
    """For every block b, ‖A[b, not b]‖_F / ‖A[b, :]‖_F and ‖A[b, b]‖_F / ‖A[b, :]‖_F."""
    whole = torch.stack([rows.norm() for rows in M.split(sizes)])
    inside = [rows.split(sizes, dim=1)[b].norm() for b, rows in enumerate(M.split(sizes))]
    inside = torch.stack(inside)
    return (whole**2 - inside**2).clamp_min(0).sqrt() / whole, inside / whole


def z_scores(estimate, truth, stderr):
    return ((estimate - truth) / stderr).abs().max()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_estimates_are_within_standard_errors_of_the_norms_of_row_blocks(distribution):
    M = symmetric()
    c = block_coupling(named(MatrixOperator(M)), num_probes=500, distribution=distribution)
    error, cosine = row_blocks(M)
    assert z_scores(c.relative_error, error, c.relative_error_stderr) < 4
    assert z_scores(c.cosine, cosine, c.cosine_stderr) < 4
    assert c.relative_error_stderr.max() < 0.05


def test_estimates_for_a_hessian_are_within_standard_errors_of_the_dense_answer():
    p = gallery.mlp()
    H = HessianOperator(p.model, p.batches, p.loss_fn)
    c = block_coupling(H, num_probes=300)
    sizes = tuple(parameter.numel() for parameter in p.parameters)
    error, cosine = row_blocks(dense_hessian(p.full_loss, p.parameters), sizes)
    assert c.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert z_scores(c.relative_error, error, c.relative_error_stderr) < 4
    assert z_scores(c.cosine, cosine, c.cosine_stderr) < 4


def test_error_and_cosine_are_ratios_of_means_over_the_probes():
    M, op = symmetric(), named(MatrixOperator(symmetric()))
    c = block_coupling(op, num_probes=7, seed=3)
    V = op.space.random(7, seed=3)
    F, K = M @ V, torch.block_diag(*[M[b, b] for b in blocks()]) @ V
    for i, b in enumerate(blocks()):
        f, k = F[b], K[b]
        torch.testing.assert_close(c.relative_error[i], (f - k).norm() / f.norm())
        torch.testing.assert_close(c.cosine[i], (f * k).sum() / f.norm() / k.norm())
        remainder = (k * (k - f)).sum() ** 2 / (f.norm() * k.norm()) ** 2
        torch.testing.assert_close(c.defect[i], remainder, rtol=1e-9, atol=1e-14)


def blocks():
    starts = [0, *torch.tensor(SIZES).cumsum(0).tolist()]
    return [slice(*ends) for ends in itertools.pairwise(starts)]


def test_standard_errors_are_the_spread_of_the_estimates():
    op = named(MatrixOperator(symmetric()))
    results = [block_coupling(op, num_probes=50, seed=seed) for seed in range(100)]
    for name in ("relative_error", "cosine"):
        spread = torch.stack([getattr(c, name) for c in results]).std(0)
        stated = torch.stack([getattr(c, f"{name}_stderr") for c in results]).square().mean(0)
        # The spread of 100 estimates is known to 7 %, and the jackknife is slightly too wide.
        ratio = stated.sqrt() / spread
        assert ((ratio > 0.75) & (ratio < 1.4)).all()


def test_a_block_diagonal_matrix_has_no_error():
    M = torch.block_diag(*[symmetric(size) for size in SIZES])
    c = block_coupling(named(MatrixOperator(M)))
    assert c.relative_error.max() < 1e-15
    assert (c.cosine - 1).abs().max() < 1e-15
    assert c.nonlinear == ()


def test_rows_without_entries_in_their_block_have_error_one_and_cosine_zero():
    M = symmetric()
    for b in blocks():
        M[b, b] = 0
    c = block_coupling(named(MatrixOperator(M)))
    assert torch.equal(c.relative_error, torch.ones(4).double())
    assert torch.equal(c.cosine, torch.zeros(4).double())
    assert torch.equal(c.defect, torch.zeros(4).double())


def test_rows_of_zeros_have_error_zero_and_cosine_one():
    M = symmetric()
    M[:5] = 0
    M[:, :5] = 0
    c = block_coupling(named(MatrixOperator(M)))
    zero, one = torch.zeros(2).double(), torch.ones(2).double()
    assert torch.equal(c.relative_error[:2], zero)
    assert torch.equal(c.relative_error_stderr[:2], zero)
    assert torch.equal(c.cosine[:2], one)
    assert torch.equal(c.defect[:2], zero)
    assert torch.isfinite(c.defect_stderr).all()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_squares_of_error_and_cosine_add_up_to_one_for_a_symmetric_matrix(distribution, seed):
    op = named(MatrixOperator(symmetric(seed=seed)))
    c = block_coupling(op, distribution=distribution, seed=seed)
    assert (c.defect > -1e-14).all()
    assert (c.defect < 4 * c.defect_stderr).all()
    assert c.nonlinear == ()


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_the_scale_of_a_matrix_changes_no_coupling(scale):
    M = symmetric()
    c, scaled = (block_coupling(named(MatrixOperator(m))) for m in (M, scale * M))
    for name in ("relative_error", "relative_error_stderr", "cosine", "cosine_stderr"):
        torch.testing.assert_close(getattr(scaled, name), getattr(c, name), rtol=1e-12, atol=0)


def test_blocks_of_other_scales_have_couplings_of_their_own():
    M = torch.block_diag(symmetric(5), 1e-200 * symmetric(35))
    c = block_coupling(named(MatrixOperator(M)), num_probes=500)
    error, cosine = row_blocks(torch.block_diag(symmetric(5), symmetric(35)))
    assert z_scores(c.relative_error, error, c.relative_error_stderr) < 4
    assert z_scores(c.cosine, cosine, c.cosine_stderr) < 4


def noisy(M):
    """Products with noise as large as they are themselves, another one every time."""
    generator = torch.Generator().manual_seed(0)

    def product(v):
        noise = torch.randn(len(M), generator=generator).double()
        return M @ v + noise * (M @ v).norm() / len(M) ** 0.5

    return product


def of_direction(M):
    """Products that forget the length of the vector."""
    return lambda v: M @ v / v.norm()


@pytest.mark.parametrize("kind", [noisy, of_direction])
def test_squares_do_not_add_up_to_one_for_products_that_are_not_linear(kind):
    op = LambdaOperator(sum(SIZES), kind(symmetric()), dtype=torch.float64)
    c = block_coupling(named(op), num_probes=64)
    assert "3" in c.nonlinear
    assert c.defect[3] > 0.04
    assert "the products are not those of a linear map" in repr(c)


def test_finite_differences_in_double_precision_are_linear_enough():
    p = gallery.mlp()
    H = HessianOperator(p.model, p.batches, p.loss_fn, method="finite_difference")
    exact = HessianOperator(p.model, p.batches, p.loss_fn)
    c, truth = block_coupling(H), block_coupling(exact)
    assert c.nonlinear == ()
    torch.testing.assert_close(c.relative_error, truth.relative_error, rtol=1e-7, atol=0)


def test_modules_and_labels_group_the_blocks():
    p = gallery.mlp()
    H = HessianOperator(p.model, p.batches, p.loss_fn)
    assert block_coupling(H, "module").names == ("0", "2")
    assert block_coupling(H, lambda name, slot: name.split(".")[1]).names == ("weight", "bias")


@pytest.mark.parametrize("by", ["parameter", lambda name, slot: "all"])
def test_products_are_counted_and_taken_in_two_passes(by):
    counted = named(CountingOperator(MatrixOperator(symmetric())))
    c = block_coupling(counted, by, num_probes=5)
    assert c.matvecs == counted.matvecs == 5 * (1 + len(c.names))
    assert counted.matmats == 2


def test_chunks_of_probes_change_nothing(monkeypatch):
    op = named(CountingOperator(MatrixOperator(symmetric())))
    c = block_coupling(op, num_probes=5)
    monkeypatch.setattr(blocks_module, "free_bytes", lambda device: 2 * 2 * 4 * 40 * 8)
    chunked = block_coupling(op, num_probes=5)
    assert op.matmats > 2 * 2
    torch.testing.assert_close(chunked.relative_error, c.relative_error, rtol=1e-12, atol=0)
    torch.testing.assert_close(chunked.cosine_stderr, c.cosine_stderr, rtol=1e-12, atol=0)


def test_the_report_fits_the_screen():
    op = named(MatrixOperator(symmetric(30)), [1] * 30)
    lines = repr(block_coupling(op, num_probes=4)).splitlines()
    assert lines[0] == "BlockCoupling  30 blocks, 4 gaussian probes, 124 products"
    assert len(lines) <= 15
    assert any("... and 20 more" in line for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_probes": 1}, "expected num_probes to be at least 2, for standard errors, got 1"),
        ({"distribution": "cauchy"}, "unknown distribution 'cauchy'"),
        ({"by": "layer"}, "unknown grouping by='layer'"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        block_coupling(named(MatrixOperator(symmetric())), **options)


def test_coupling_needs_named_parameters():
    with pytest.raises(NoParametersError, match="MatrixOperator has no named parameters to group"):
        block_coupling(MatrixOperator(symmetric()))


def test_products_that_hold_nan_are_named():
    with pytest.raises(NonFiniteError, match="hold NaN or infinity"):
        block_coupling(named(MatrixOperator(symmetric() * float("nan"))))


def test_a_report_survives_a_file_and_is_a_table(tmp_path):
    c = block_coupling(named(MatrixOperator(symmetric())), num_probes=4)
    c.save(tmp_path / "c.safetensors")
    again = BlockCoupling.load(tmp_path / "c.safetensors")
    assert repr(again) == repr(c)
    assert again.names == c.names
    assert c.scalars()["relative_error/1"] == float(c.relative_error[0])
