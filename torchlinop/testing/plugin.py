"""A plugin of pytest: operators and problems with known answers, and a choice of oracle.

``pytest -p torchlinop.testing.plugin --torchlinop-oracle=curvlinops``, or, in a conftest.py,
``pytest_plugins = ["torchlinop.testing.plugin"]``.
"""

from __future__ import annotations

import importlib.util

import pytest

from torchlinop.testing.oracle_choice import ORACLES, Oracle
from torchlinop.testing.problems import EigenProblem, problem, problems
from torchlinop.testing.rotated import RotatedOperator
from torchlinop.testing.stress import stress_operators, stress_spectra

_ROWS = 200
_PRESCRIBED = [name for name in problems() if "digits" not in name]  # those wait for no training


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--torchlinop-oracle``."""
    parser.getgroup("torchlinop").addoption(
        "--torchlinop-oracle",
        choices=list(ORACLES),
        default="dense",
        help="what torchlinop_oracle takes dense matrices from (default: dense formulas)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse an oracle that is not installed, before any test runs."""
    oracle = config.getoption("--torchlinop-oracle")
    if oracle == "curvlinops" and importlib.util.find_spec("curvlinops") is None:
        raise pytest.UsageError(
            "--torchlinop-oracle=curvlinops needs curvlinops, which is not installed; "
            'pip install "torchlinop[oracle]"'
        )


@pytest.fixture(scope="session")
def torchlinop_oracle(request: pytest.FixtureRequest) -> Oracle:
    """Dense Hessian, GGN, empirical Fisher and K-FAC of (model, loss, batches)."""
    return ORACLES[request.config.getoption("--torchlinop-oracle")]


@pytest.fixture(params=list(stress_spectra()))
def torchlinop_stress_operator(request: pytest.FixtureRequest) -> RotatedOperator:
    """Every operator, in turn, on which solvers go wrong; each has its ``eigenvalues``."""
    return stress_operators(_ROWS)[request.param]


@pytest.fixture(params=_PRESCRIBED)
def torchlinop_problem(request: pytest.FixtureRequest) -> EigenProblem:
    """Every problem with a prescribed spectrum, in turn: an operator and its eigenvalues."""
    return problem(request.param, _ROWS)
