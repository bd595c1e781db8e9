"""The eigenvalues a problem is said to have are those of its operator."""

import sys

import pytest
import torch
from scipy.integrate import quad
from scipy.sparse.linalg import eigsh

from torchlinop import MatrixOperator, as_linear_operator
from torchlinop.errors import OptionError
from torchlinop.testing import assert_eigenpairs, assert_symmetric, problem, problems, spectra
from torchlinop.testing.digits import digits
from torchlinop.testing.problems import haar

F64 = torch.float64
PRESCRIBED = [name for name in problems() if "digits" not in name]
DTYPES = [torch.float32, F64]


def distance(p):
    """Of the operator's dense eigenvalues from those said, relative to the norm."""
    dense = torch.linalg.eigvalsh(p.operator.to_dense().double()).flip(0)
    return float((dense - p.eigenvalues).abs().max()) / p.norm


@pytest.mark.parametrize("rotation", [None, haar], ids=["hartley", "haar"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PRESCRIBED)
def test_eigenvalues_are_those_of_the_dense_matrix(name, dtype, rotation):
    p = problem(name, 60, dtype=dtype, rotation=rotation, seed=3)
    assert p.name == name
    assert p.operator.dtype == dtype
    assert p.eigenvalues.dtype == F64
    assert (p.eigenvalues.diff() <= 0).all()
    assert distance(p) <= 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (F64, 1e-14)])
def test_softmax_regression_has_its_closed_form(dtype, rounding):
    p = problem("digits softmax", dtype=dtype)
    assert distance(p) <= rounding
    assert p.eigenvalues[:9].tolist() == pytest.approx([1.045530] * 9, abs=5e-7)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (F64, 1e-9)])
def test_the_largest_of_the_networks_eigenvalues_are_those_arpack_finds(dtype, rounding):
    p = problem("digits network", dtype=dtype)
    A = as_linear_operator(p.operator)
    v0 = p.operator.space.random(1)[:, 0].numpy()
    found = eigsh(A, 3, which="LA", v0=v0, tol=1e-6, return_eigenvectors=False)
    assert found[::-1].tolist() == pytest.approx(p.wanted(3).tolist(), abs=rounding * p.norm)


def test_a_million_rows_take_no_matrix():
    p = problem("neural", 10**6)
    assert_symmetric(p.operator)
    X = p.operator.eigenvectors(torch.arange(3))
    assert_eigenpairs(p.operator, p.wanted(3), X, rtol=1e-13, exact=p.eigenvalues)


def test_the_two_halves_of_an_indefinite_spectrum_mirror_each_other():
    for n in (20, 21):
        eigenvalues = problem("indefinite", n).eigenvalues
        assert torch.equal(eigenvalues, -eigenvalues.flip(0))


@pytest.mark.parametrize(("which", "expected"), [("LA", 5), ("SA", 0), ("LM", 5)])
def test_the_wanted_come_first(which, expected):
    assert float(problem("low rank").wanted(1, which)) == expected


@pytest.mark.parametrize("n", [1, 2, 5, 100])
def test_semicircle_has_a_share_of_its_mass_above_each_quantile(n):
    for i, x in enumerate(spectra.semicircle(n).tolist()):
        above, _ = quad(lambda t: 2 / torch.pi * max(0.0, 1 - t * t) ** 0.5, x, 1)
        assert above == pytest.approx((i + 0.5) / n, abs=1e-8)


def test_what_no_problem_can_be_is_refused():
    with pytest.raises(OptionError, match="unknown problem 'spiral'; choose one of flat, poly"):
        problem("spiral")
    with pytest.raises(OptionError, match="expected n of at least 20"):
        problem("flat", 19)
    with pytest.raises(OptionError, match="has its own rows and eigenvectors, got n=7"):
        problem("digits softmax", 7)
    with pytest.raises(OptionError, match="unknown which 'SM'; choose one of LA, SA, LM"):
        problem("flat").wanted(2, "SM")


def test_digits_say_which_package_they_come_with(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'scikit-learn: pip install "torchlinop\[demo\]"'
    ):
        digits()


def test_a_dense_problem_holds_its_matrix():
    assert isinstance(problem("step", 40, rotation=haar).operator, MatrixOperator)
