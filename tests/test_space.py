"""Inner products, norms and random vectors of a vector space."""

import pytest
import torch

from torchlinop import VectorSpace
from torchlinop.errors import OptionError

SPACE = VectorSpace(40, torch.float64, torch.device("cpu"))


def test_the_inner_product_of_blocks_is_conjugate_linear_in_the_first():
    space = VectorSpace(3, torch.complex128, torch.device("cpu"))
    X, Y = torch.randn(2, 3, 2, dtype=torch.complex128)
    torch.testing.assert_close(space.inner(X, Y), X.conj().T @ Y)
    torch.testing.assert_close(space.norm(X) ** 2, space.inner(X, X).diagonal().real)


@pytest.mark.parametrize("columns", [(1, 1), (3, 2), (20, 1)])
def test_sums_of_a_million_single_precision_products_are_those_of_double_precision(columns):
    space = VectorSpace(1_000_003, torch.float32, torch.device("cpu"))
    k, m = columns
    X = space.random(k, 0)
    Y = X[:, :1] + 0.1 * space.random(m, 1)
    exact = X.double().mT @ Y.double()
    lengths = X.double().norm(dim=0)
    assert space.inner(X, Y).dtype == space.norm(X).dtype == torch.float64
    assert float((space.inner(X, Y) - exact).abs().max()) < 3e-7 * float(exact.abs().max())
    torch.testing.assert_close(space.norm(X), lengths, rtol=3e-7, atol=0)
    torch.testing.assert_close(space.norm(X[:, 0]), lengths[0], rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.complex64])
def test_inner_products_and_norms_are_in_double_precision_whatever_the_entries(dtype):
    space = VectorSpace(20_000, dtype, torch.device("cpu"))
    X = 600 * space.random(2).mT.contiguous().mT
    exact = X.to(torch.promote_types(dtype, torch.float64))
    torch.testing.assert_close(space.inner(X, X), exact.mH @ exact, rtol=1e-6, atol=1e4)
    torch.testing.assert_close(space.norm(X), exact.norm(dim=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.complex64])
@pytest.mark.parametrize("n", [1000, 100_003])
def test_dots_are_the_diagonal_of_all_inner_products(n, dtype):
    space = VectorSpace(n, dtype, torch.device("cpu"))
    X = space.random(3, 0)
    Y = X + space.random(3, 1)
    wide = torch.promote_types(dtype, torch.float64)
    exact = (X.to(wide).conj() * Y.to(wide)).sum(0)
    torch.testing.assert_close(space.dots(X, Y), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "sphere"])
def test_columns_do_not_depend_on_how_many_are_drawn(distribution):
    four, two = SPACE.random(4, 7, distribution), SPACE.random(2, 7, distribution)
    assert torch.equal(four[:, :2], two)


def test_streams_of_neighbouring_seeds_share_no_column():
    a, b = SPACE.random(3, 0), SPACE.random(3, 1)
    assert not any(torch.equal(x, y) for x in a.T for y in b.T)


def test_sphere_vectors_have_norm_root_n_and_rademacher_entries_have_modulus_one():
    torch.testing.assert_close(
        SPACE.norm(SPACE.random(3, 0, "sphere")) ** 2, torch.full((3,), 40.0).double()
    )
    assert torch.equal(SPACE.random(3, 0, "rademacher").abs(), torch.ones(40, 3).double())


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "sphere"])
def test_entries_have_mean_zero_and_variance_one(distribution):
    # 40 x 2000 entries: the standard error of the variance is below sqrt(2 / 80000) = 0.005.
    V = SPACE.random(2000, 3, distribution)
    assert abs(float(V.mean())) < 5 * 80000**-0.5
    assert abs(float(V.pow(2).mean()) - 1) < 0.025


def test_drawing_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    SPACE.random(2)
    assert torch.equal(before, torch.random.get_rng_state())


def test_unknown_distributions_are_refused_with_the_choices():
    with pytest.raises(
        OptionError, match="unknown distribution 'cauchy'; choose one of gaussian, rad"
    ):
        SPACE.random(1, 0, "cauchy")
