"""For tests: assertions about operators and answers, operators with known answers, oracles."""

from torchlinop.testing.answers import assert_calibrated, assert_eigenpairs
from torchlinop.testing.assertions import (
    assert_deterministic,
    assert_finite,
    assert_linear,
    assert_positive_semidefinite,
    assert_symmetric,
)
from torchlinop.testing.equality import assert_equal_operators
from torchlinop.testing.problems import EigenProblem, problem, problems
from torchlinop.testing.rotated import RotatedOperator
from torchlinop.testing.stress import stress_operators, stress_spectra
from torchlinop.testing.subjects import as_operator

__all__ = [
    "EigenProblem",
    "RotatedOperator",
    "as_operator",
    "assert_calibrated",
    "assert_deterministic",
    "assert_eigenpairs",
    "assert_equal_operators",
    "assert_finite",
    "assert_linear",
    "assert_positive_semidefinite",
    "assert_symmetric",
    "problem",
    "problems",
    "stress_operators",
    "stress_spectra",
]
