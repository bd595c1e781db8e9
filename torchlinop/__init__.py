"""Curvature matrices of neural networks as linear operators for every numerical library."""

import importlib
import logging
from typing import TYPE_CHECKING

from torchlinop.algorithms.block_coupling import BlockCoupling, block_coupling
from torchlinop.algorithms.conjugate_gradient import conjugate_gradient
from torchlinop.algorithms.diagonal import diagonal
from torchlinop.algorithms.eigen_result import EigenResult
from torchlinop.algorithms.extremal import condition_number, extremal_eigenvalues
from torchlinop.algorithms.lanczos import lanczos
from torchlinop.algorithms.lobpcg import lobpcg
from torchlinop.algorithms.matrix_function import apply_function
from torchlinop.algorithms.minres import minres
from torchlinop.algorithms.norms import norm
from torchlinop.algorithms.nystrom import nystrom
from torchlinop.algorithms.power_iteration import deflated_power_iteration, power_iteration_one
from torchlinop.algorithms.quadrature import logdet, slq
from torchlinop.algorithms.randomized_eigh import randomized_eigh
from torchlinop.algorithms.solve import inverse, solve
from torchlinop.algorithms.spectral_density import spectral_density
from torchlinop.algorithms.stochastic_power_iteration import stochastic_power_iteration
from torchlinop.algorithms.trace import hutch_plus_plus, hutchinson, trace, xnystrace, xtrace
from torchlinop.algorithms.tridiagonal import lanczos_tridiagonal
from torchlinop.derivatives import FiniteDifference, ForwardOverReverse, ReverseOverReverse
from torchlinop.errors import TorchlinopError, TorchlinopWarning
from torchlinop.operators.base import CurvatureOperator
from torchlinop.operators.blocks import BlockDiagonalOperator
from torchlinop.operators.check import CheckReport
from torchlinop.operators.counting import CountingOperator
from torchlinop.operators.diagonal import DiagonalOperator, ggn_diagonal
from torchlinop.operators.empirical_fisher import (
    EmpiricalFisherOperator,
    GradientCovarianceOperator,
)
from torchlinop.operators.explicit import LambdaOperator, MatrixOperator
from torchlinop.operators.fisher import FisherOperator
from torchlinop.operators.gauss_newton import GGNOperator
from torchlinop.operators.gradient_outer import GradientOuterOperator
from torchlinop.operators.hessian import HessianOperator
from torchlinop.operators.jacobian import JacobianOperator
from torchlinop.parameters import ParameterLayout, match_names, match_regex
from torchlinop.settings import options
from torchlinop.space import VectorSpace

if TYPE_CHECKING:
    from torchlinop.adapters.cupy import as_cupy_operator
    from torchlinop.adapters.cupy_solvers import cupy_eigsh, cupy_lobpcg
    from torchlinop.adapters.scipy import as_linear_operator, from_linear_operator
    from torchlinop.operators.kfac import EKFACOperator, KFACOperator
    from torchlinop.spectrum import (
        LanczosConfig,
        SpectrumResult,
        compute_spectrum,
        create_operator,
        lanczos_algorithm,
    )

__all__ = [
    "BlockCoupling",
    "BlockDiagonalOperator",
    "CheckReport",
    "CountingOperator",
    "CurvatureOperator",
    "DiagonalOperator",
    "EKFACOperator",
    "EigenResult",
    "EmpiricalFisherOperator",
    "FiniteDifference",
    "FisherOperator",
    "ForwardOverReverse",
    "GGNOperator",
    "GradientCovarianceOperator",
    "GradientOuterOperator",
    "HessianOperator",
    "JacobianOperator",
    "KFACOperator",
    "LambdaOperator",
    "LanczosConfig",
    "MatrixOperator",
    "ParameterLayout",
    "ReverseOverReverse",
    "SpectrumResult",
    "TorchlinopError",
    "TorchlinopWarning",
    "VectorSpace",
    "apply_function",
    "as_cupy_operator",
    "as_linear_operator",
    "block_coupling",
    "compute_spectrum",
    "condition_number",
    "conjugate_gradient",
    "create_operator",
    "cupy_eigsh",
    "cupy_lobpcg",
    "deflated_power_iteration",
    "diagonal",
    "extremal_eigenvalues",
    "from_linear_operator",
    "ggn_diagonal",
    "hutch_plus_plus",
    "hutchinson",
    "inverse",
    "lanczos",
    "lanczos_algorithm",
    "lanczos_tridiagonal",
    "lobpcg",
    "logdet",
    "match_names",
    "match_regex",
    "minres",
    "norm",
    "nystrom",
    "options",
    "power_iteration_one",
    "randomized_eigh",
    "slq",
    "solve",
    "spectral_density",
    "stochastic_power_iteration",
    "trace",
    "xnystrace",
    "xtrace",
]

__version__ = "0.1.0"

logging.getLogger("torchlinop").addHandler(logging.NullHandler())  # silent unless asked

# Imported when they are asked for: these take as long as all the rest, SciPy more.
_LATER = {
    "EKFACOperator": "operators.kfac",
    "KFACOperator": "operators.kfac",
    "LanczosConfig": "spectrum",
    "SpectrumResult": "spectrum",
    "as_cupy_operator": "adapters.cupy",
    "as_linear_operator": "adapters.scipy",
    "compute_spectrum": "spectrum",
    "create_operator": "spectrum",
    "cupy_eigsh": "adapters.cupy_solvers",
    "cupy_lobpcg": "adapters.cupy_solvers",
    "from_linear_operator": "adapters.scipy",
    "lanczos_algorithm": "spectrum",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"torchlinop.{_LATER[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
