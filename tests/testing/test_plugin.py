"""The plugin gives tests its fixtures, and the oracle they ask for."""

import importlib.util
import sys

import pytest
import torch
from hypothesis import given, settings

from torchlinop import EmpiricalFisherOperator, GGNOperator, HessianOperator, KFACOperator
from torchlinop.testing import assert_equal_operators, strategies, stress_spectra
from torchlinop.testing.gallery import binary, convolutions, mlp, of_inputs, regression
from torchlinop.testing.oracle_choice import ORACLES

pytest_plugins = ["pytester"]

PLUGIN = "torchlinop.testing.plugin"
OPERATORS = {
    "hessian": lambda p: HessianOperator(p.model, p.batches, p.loss_fn),
    "ggn": lambda p: GGNOperator(p.model, p.batches, of_inputs, p.criterion),
    "empirical_fisher": lambda p: EmpiricalFisherOperator(
        p.model, p.batches, of_inputs, p.criterion
    ),
    "kfac": lambda p: KFACOperator(p.model, p.batches, of_inputs, p.criterion),
}


@pytest.mark.filterwarnings("ignore")  # curvlinops imports what torch has deprecated
@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("matrix", OPERATORS)
@pytest.mark.parametrize("build", [mlp, regression, binary])
def test_operators_equal_the_matrices_of_both_oracles(build, matrix, oracle):
    p = build()
    dense = getattr(ORACLES[oracle], matrix)(p.model, p.criterion, p.batches)
    assert_equal_operators(OPERATORS[matrix](p), dense, rtol=1e-12)


def test_kfac_of_convolutions_is_that_of_the_dense_oracle():
    p = convolutions()
    dense = ORACLES["dense"].kfac(p.model, p.criterion, p.batches)
    assert_equal_operators(OPERATORS["kfac"](p), dense, rtol=1e-12)


@settings(max_examples=20)
@given(strategies.model_problems())
def test_empirical_fisher_of_drawn_networks_is_that_of_the_dense_oracle(p):
    dense = ORACLES["dense"].empirical_fisher(p.model, p.criterion, p.batches)
    assert_equal_operators(OPERATORS["empirical_fisher"](p), dense, rtol=1e-11)


def run(pytester, code, *options):
    pytester.makepyfile(code)
    return pytester.runpytest_inprocess("-p", PLUGIN, "-p", "no:cacheprovider", *options)


@pytest.mark.parametrize(
    ("options", "name"), [([], "dense"), (["--torchlinop-oracle=curvlinops"], "curvlinops")]
)
def test_the_oracle_is_the_one_asked_for(pytester, options, name):
    code = f"def test_it(torchlinop_oracle): assert torchlinop_oracle.name == {name!r}"
    run(pytester, code, *options).assert_outcomes(passed=1)


def test_an_unknown_oracle_is_refused(pytester):
    result = run(pytester, "", "--torchlinop-oracle=delphi")
    result.stderr.fnmatch_lines("*invalid choice: 'delphi' (choose from *dense*, *curvlinops*)")


def test_an_oracle_that_is_not_installed_is_refused(pytester, monkeypatch):
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    result = run(pytester, "", "--torchlinop-oracle=curvlinops")
    result.stderr.fnmatch_lines('*not installed; pip install "torchlinop[[]oracle[]]"*')


def test_stress_operators_and_problems_come_one_a_test(pytester):
    result = run(
        pytester,
        """
        import torch

        def test_spectrum(torchlinop_stress_operator):
            assert torchlinop_stress_operator.eigenvalues.shape == (200,)

        def test_problem(torchlinop_problem):
            trace = torchlinop_problem.operator.to_dense().trace()
            assert abs(trace - torchlinop_problem.eigenvalues.sum()) < 1e-12 * (
                1 + 200 * torchlinop_problem.norm)
        """,
    )
    result.assert_outcomes(passed=len(stress_spectra()) + 13)


def test_a_failure_shows_defect_seed_and_lines_to_paste(pytester):
    result = run(
        pytester,
        """
        from torchlinop.testing import assert_symmetric

        def test_it(torchlinop_stress_operator):
            A = torchlinop_stress_operator.to_dense()
            A[0, 1] += 1e-3 + A.abs().max()
            assert_symmetric(A, seed=4)
        """,
        "-k",
        "neural",
    )
    result.stdout.fnmatch_lines(["*<u, A v> - <A u, v>* of the products*", "*seed=4*"])
    result.stdout.fnmatch_lines(["*V = A.space.random(16, 4); V /= V.norm(dim=0)"])


def test_the_plugin_may_be_named_twice(pytester):
    pytester.makeconftest(f'pytest_plugins = ["{PLUGIN}"]')
    run(pytester, "def test_it(torchlinop_oracle): pass").assert_outcomes(passed=1)


def test_class_weights_are_part_of_the_loss_terms():
    p = mlp()
    w = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    dense = ORACLES["dense"].empirical_fisher(p.model, torch.nn.CrossEntropyLoss(w), p.batches)
    (X, y), expected = p.full_batch, torch.zeros_like(dense)
    for n in range(len(y)):
        loss = torch.nn.functional.cross_entropy(p.model(X[n]), y[n])
        g = torch.cat([g.flatten() for g in torch.autograd.grad(loss, p.parameters)])
        expected += w[y[n]] ** 2 / w[y].sum() * torch.outer(g, g)
    torch.testing.assert_close(dense, expected, rtol=0, atol=1e-14)
