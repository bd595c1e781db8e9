"""What the strategies draw is what they say: right operators, equal tensors, whole data."""

import numpy as np
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from torchlinop import GGNOperator, HessianOperator, as_linear_operator
from torchlinop.testing import assert_equal_operators, strategies
from torchlinop.testing.gallery import of_inputs
from torchlinop.testing.oracles import dense_ggn, dense_hessian
from torchlinop.testing.rotated import RotatedOperator

F64 = torch.float64
DRAWN = settings(phases=[Phase.generate])  # the simplest one would take minutes to find


@given(strategies.spectra(min_size=3, max_size=9, positive=True))
def test_positive_spectra_descend_to_no_less_than_zero(eigenvalues):
    assert 3 <= len(eigenvalues) <= 9
    assert (eigenvalues.diff() <= 0).all()
    assert eigenvalues[-1] >= 0


def test_spectra_may_be_negative_and_multiple():
    find(strategies.spectra(), lambda s: s.min() < 0, settings=DRAWN)
    find(strategies.spectra(), lambda s: len(s) > 3 and s[0] == s[2] != 0, settings=DRAWN)


@settings(max_examples=50)
@given(strategies.spectra(max_size=9), strategies.dtypes(), st.data())
def test_operators_have_the_spectrum_drawn(eigenvalues, dtype, data):
    op = data.draw(strategies.operators(eigenvalues=st.just(eigenvalues), dtype=st.just(dtype)))
    assert op.dtype == dtype
    D = op.to_dense().double()
    found = torch.linalg.eigvalsh((D + D.T) / 2).flip(0)
    rounding = 100 * torch.finfo(dtype).eps * float(eigenvalues.abs().max())
    assert float((found - eigenvalues).abs().max()) <= rounding


@given(st.integers(1, 5), st.sampled_from([None, 1, 3]), strategies.dtypes(), st.data())
def test_layouts_of_a_block_hold_the_same_numbers(n, columns, dtype, data):
    X = data.draw(strategies.vectors(n, columns=columns, dtype=dtype))
    Y = data.draw(strategies.layouts(X))
    assert X.shape == ((n,) if columns is None else (n, columns))
    assert X.dtype == Y.dtype == dtype
    assert torch.equal(X, Y)


def test_some_layouts_are_not_contiguous_and_some_not_at_the_start_of_their_memory():
    X = torch.randn(3, 2)
    find(strategies.layouts(X), lambda Y: Y.stride() == (1, 3), settings=DRAWN)
    find(
        strategies.layouts(X),
        lambda Y: not Y.is_contiguous() and not Y.mT.is_contiguous(),
        settings=DRAWN,
    )
    find(strategies.layouts(X), lambda Y: Y.storage_offset() == 1, settings=DRAWN)


@settings(max_examples=50)
@given(strategies.operators(dtype=st.just(F64)), st.data())
def test_products_do_not_depend_on_the_memory_of_the_vector(op, data):
    V = data.draw(strategies.vectors(op.size, columns=2))
    expected = op.to_dense() @ V.contiguous()
    rounding = 1e-13 * float(op.to_dense().norm()) * float(V.norm())
    assert float((op.matmat(V) - expected).norm()) <= rounding


@settings(max_examples=50)
@given(st.data())
def test_the_scipy_adapter_takes_arrays_in_any_memory(data):
    A = as_linear_operator(RotatedOperator(torch.linspace(1, 2, 6, dtype=F64)))
    X = np.random.default_rng(0).standard_normal((6, 2))
    laid_out = data.draw(strategies.array_layouts(X))
    assert np.array_equal(X, laid_out)
    np.testing.assert_allclose(A @ laid_out, A @ X, rtol=0, atol=1e-14)


@given(st.integers(1, 7), st.data())
def test_batches_are_the_data_in_pieces(N, data):
    full = (torch.arange(N), torch.arange(2.0 * N).view(N, 2))
    drawn = data.draw(strategies.batches(full))
    assert 1 <= len(drawn) <= 4
    for i, whole in enumerate(full):
        assert torch.equal(torch.cat([batch[i] for batch in drawn]), whole)


@settings(max_examples=20)
@given(strategies.model_problems())
def test_operators_of_drawn_networks_equal_their_dense_oracles(p):
    H = HessianOperator(p.model, p.batches, p.loss_fn)
    G = GGNOperator(p.model, p.batches, of_inputs, p.criterion)
    dense_G = dense_ggn(p.loss_of_outputs, p.outputs, p.parameters)
    assert_equal_operators(G, dense_G, rtol=1e-12)
    # The Hessian may be small by cancellation: relative to the GGN's size.
    error = (H.to_dense() - dense_hessian(p.full_loss, p.parameters)).abs().max()
    assert error <= 1e-12 * dense_G.abs().max()
