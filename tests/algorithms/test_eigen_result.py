"""A result shows as many digits as it has, and survives a file."""

import functools

import pytest
import torch

from torchlinop import HessianOperator, MatrixOperator
from torchlinop.algorithms.eigen_result import EigenResult
from torchlinop.algorithms.lanczos import lanczos
from torchlinop.errors import NoParametersError, NotConvergedWarning, OptionError
from torchlinop.testing import gallery
from torchlinop.testing.oracles import dense_hessian


@functools.cache
def problem():
    return gallery.mlp()


@functools.cache
def of_hessian(k=4):
    p = problem()
    return lanczos(HessianOperator(p.model, p.batches, p.loss_fn), k, which="LA", tol=1e-10)


def of_matrix(**options):
    spectrum = torch.linspace(0, 1, 200, dtype=torch.float64) ** 8
    return lanczos(MatrixOperator(gallery.with_spectrum(spectrum)[0]), 12, **options)


def test_a_result_unpacks_to_the_eigenpairs_of_the_dense_hessian():
    values, vectors = of_hessian()
    H = dense_hessian(problem().full_loss, problem().parameters)
    exact = torch.linalg.eigvalsh(H).flip(0)[:4]
    torch.testing.assert_close(values, exact, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(H @ vectors, vectors * values, rtol=0, atol=1e-9)


def test_an_eigenvector_by_parameter_is_the_flat_one():
    pieces = of_hessian().as_parameters(1)
    parameters = dict(problem().model.named_parameters())
    assert {n: p.shape for n, p in pieces.items()} == {n: p.shape for n, p in parameters.items()}
    flat = torch.cat([p.flatten() for p in pieces.values()])
    assert torch.equal(flat, of_hessian().eigenvectors[:, 1])


def test_shares_add_up_to_one():
    shares = of_hessian().shares(0)
    pieces = of_hessian().as_parameters(0)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-14)
    name = max(shares, key=shares.get)
    assert shares[name] == pytest.approx(float(pieces[name].pow(2).sum()), abs=1e-12)


def test_the_repr_has_a_line_a_pair_with_the_largest_share():
    lines = repr(of_hessian()).splitlines()
    assert lines[0].startswith(
        "EigenResult  4 of 4 converged | LA | thick-restart Lanczos (ncv=20)"
    )
    assert lines[0].endswith("| float64 | seed 0")
    assert "largest share" in lines[1]
    name, share = max(of_hessian().shares(0).items(), key=lambda item: item[1])
    assert lines[2].endswith(f"{name} {100 * share:.0f} %")
    assert lines[-1] == "  warnings: none"


def test_the_repr_is_short_and_shows_the_digits_the_residuals_support():
    with pytest.warns(NotConvergedWarning):
        result = of_matrix(max_iter=14, which="LA")
    lines = repr(result).splitlines()
    assert len(lines) <= 15
    assert "... and 2 more" in lines[-3]
    assert "* not converged" in lines[-2]
    assert "pairs reached tol" in lines[-1]
    last = lines[-4].split()
    assert len(last[1].split("e")[0]) <= 5  # a residual of per cents


def test_parameters_of_a_plain_matrix_are_refused():
    result = of_matrix()
    with pytest.raises(NoParametersError, match="no named parameters; use the columns of"):
        result.as_parameters(0)


def test_a_result_survives_a_file(tmp_path):
    result = of_hessian()
    result.save(tmp_path / "r.safetensors")
    loaded = EigenResult.load(tmp_path / "r.safetensors")
    assert repr(loaded) == repr(result)
    for ours, theirs in zip(loaded, result, strict=True):
        assert torch.equal(ours, theirs)
    assert loaded.as_parameters(0).keys() == result.as_parameters(0).keys()
    assert torch.equal(loaded.history_matvecs, result.history_matvecs)


def test_scalars_name_every_eigenvalue():
    scalars = of_hessian().scalars()
    assert scalars["eigenvalues/1"] == float(of_hessian().eigenvalues[0])
    assert scalars["matvecs"] == of_hessian().matvecs


def test_history_ends_at_the_result():
    result = of_hessian()
    assert result.history_matvecs[-1] == result.matvecs
    torch.testing.assert_close(result.history_eigenvalues[-1], result.eigenvalues)
    assert bool((result.history_matvecs.diff() > 0).all())


def test_equal_values_are_flagged_as_a_possible_multiplicity():
    twice = torch.cat([torch.tensor([3.0, 3.0]), torch.linspace(0, 1, 98)]).double()
    A = gallery.with_spectrum(twice)[0]
    assert lanczos(MatrixOperator(A), 3, which="LA", block_size=2).possible_multiplicity
    assert not of_hessian().possible_multiplicity


def test_a_plot_draws_values_with_bounds_or_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
    with pytest.raises(OptionError, match="this needs matplotlib; run: pip install matplotlib"):
        of_hessian().plot()


def test_a_plot_goes_into_the_axes_given():
    class Axes:
        def __init__(self):
            self.calls = []

        def __getattr__(self, name):
            return lambda *args, **kwargs: self.calls.append((name, args, kwargs))

    ax = Axes()
    assert of_hessian().plot(ax) is ax
    name, args, _ = ax.calls[0]
    assert name == "errorbar"
    assert list(args[1]) == of_hessian().eigenvalues.tolist()
