"""Densities integrate to one, keep what is sharp, and take their names from the quadrature."""

import pytest
import torch

from torchlinop import LambdaOperator, MatrixOperator
from torchlinop.algorithms.quadrature import slq
from torchlinop.algorithms.spectral_density import smoothed, spectral_density
from torchlinop.errors import OptionError
from torchlinop.testing.gallery import with_spectrum

F64 = torch.float64


def semicircle_density(x):
    return 2 / torch.pi * (1 - x**2).clamp_min(0).sqrt()


def semicircle(n):
    x = torch.linspace(-1, 1, 200_001, dtype=F64)
    cdf = 0.5 + x * (1 - x * x).sqrt() / torch.pi + x.asin() / torch.pi
    return x[torch.searchsorted(cdf, (torch.arange(n, dtype=F64) + 0.5) / n)]


def with_outliers(n, largest=10.0):
    return torch.cat([0.5 * semicircle(n - 3), torch.tensor([2.0, 5.0, largest], dtype=F64)])


def operator(eigenvalues, dtype=F64):
    return MatrixOperator(with_spectrum(eigenvalues)[0].to(dtype))


@pytest.mark.parametrize("largest", [10.0, 1e4])
@pytest.mark.parametrize("sigma", [None, "range/m", 0.02])
@pytest.mark.parametrize("points", [100, 10_000])
def test_the_density_integrates_to_one_on_any_grid(largest, sigma, points):
    result = spectral_density(operator(with_outliers(300, largest)), 3, 40, points, sigma)
    step = float(result.grid[1] - result.grid[0])
    assert float(result.density.sum()) * step == pytest.approx(1, abs=1e-8)
    assert result.grid.shape == result.density.shape == result.stderr.shape == (points,)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_the_density_of_a_semicircle_is_near_in_mean(dtype):
    op = operator(semicircle(1000), dtype)
    result = spectral_density(op, num_runs=10, lanczos_steps=40, sigma="range/m")
    step = float(result.grid[1] - result.grid[0])
    assert float((result.density - semicircle_density(result.grid)).abs().sum()) * step <= 0.06


def test_the_default_bandwidth_does_not_smear_outliers():
    quadrature = slq(operator(with_outliers(1000, 20.0)), 10, 80)
    assert quadrature.bandwidth() == pytest.approx(1 / 80, rel=0.15)
    assert quadrature.bandwidth("range/m") == pytest.approx(20.5 / 80, rel=0.01)
    beyond = torch.linspace(0.6, 1.9, 100, dtype=F64)  # between bulk and outliers
    assert quadrature.density(beyond).value.max() < 1e-6
    assert quadrature.density(beyond, "range/m").value.max() > 1e-2


def test_eigenvalues_of_a_low_rank_stand_aside_of_zero():
    # All that is left outside of atoms are copies, of weights that may be zero to the last digit.
    eigenvalues = torch.zeros(120, dtype=F64)
    eigenvalues[:5] = torch.tensor([5, 4, 3, 2, -1], dtype=F64)
    for seed in range(10):
        found = spectral_density(operator(eigenvalues), 5, 40, seed=seed)
        assert found.quadrature.bulk == pytest.approx((0, 0), abs=1e-12)
        assert found.outliers.values.tolist() == pytest.approx([-1, 2, 3, 4, 5])
        assert float(torch.trapezoid(found.density, found.grid)) == pytest.approx(1)


def test_the_density_is_a_mean_of_gaussians_on_a_fine_grid():
    quadrature = slq(operator(semicircle(100)), 2, 5)
    grid = torch.linspace(-1, 1, 20_001, dtype=F64)
    x = (grid[:, None, None] - quadrature.nodes) / 0.3
    gaussians = torch.exp(-(x**2) / 2) / (0.3 * (2 * torch.pi) ** 0.5)
    exact = (gaussians * quadrature.weights).sum(2).mean(1)
    torch.testing.assert_close(quadrature.density(grid, 0.3).value, exact, rtol=1e-6, atol=1e-8)


def test_names_are_those_that_callers_know():
    op = operator(semicircle(100))
    result = spectral_density(
        op, num_runs=4, lanczos_steps=12, num_grid_points=50, sigma=None, seed=3
    )
    quadrature = slq(op, 4, 12, seed=3)
    assert torch.equal(result.raw_eigenvalues, quadrature.nodes)
    assert torch.equal(result.raw_weights, quadrature.weights)
    assert (result.matvecs, result.seed) == (48, 3)
    assert torch.equal(result.cdf(0.1).value, quadrature.cdf(0.1).value)
    assert torch.equal(smoothed(quadrature, 50).density, result.density)


def test_a_single_probe_has_no_standard_error():
    result = spectral_density(operator(semicircle(50)), 1, 10, 20)
    assert torch.isinf(result.stderr).all()
    assert result.negative_mass() == pytest.approx((result.negative_mass().value, 0.0, 1.0))


def test_repr_is_short_and_names_bulk_and_outliers():
    text = repr(spectral_density(operator(with_outliers(300)), 4, 40))
    assert "outliers   3: 10, 5, 2" in text
    assert "n = 300 | 4 probes x 40 steps | 160 matvecs" in text
    assert len(text.splitlines()) <= 15


def test_scalars_are_plain_numbers():
    scalars = spectral_density(operator(with_outliers(300)), 4, 40).scalars()
    assert scalars["largest_node"] == pytest.approx(10)
    assert all(isinstance(value, float) for value in scalars.values())


def test_plot_draws_into_the_axes_given():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    ax = pyplot.figure().subplots()
    assert spectral_density(operator(with_outliers(100)), 4, 20).plot(ax) is ax
    assert ax.get_yscale() == "log"


@pytest.mark.parametrize("option", [{"sigma": "wide"}, {"sigma": 0.0}, {"num_grid_points": 1}])
def test_impossible_options_are_refused_before_any_product(option):
    def refuse(v):
        raise AssertionError("a product was taken")

    with pytest.raises(OptionError, match=r"expected (sigma to be a positive|two grid points)"):
        spectral_density(LambdaOperator(10, refuse, dtype=F64), **option)
