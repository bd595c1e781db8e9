"""Curvature matrices of neural networks as linear operators for every numerical library."""

from torchlinop.adapters.scipy import as_linear_operator, from_linear_operator
from torchlinop.algorithms.block_coupling import BlockCoupling, block_coupling
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
from torchlinop.operators.kfac import EKFACOperator, KFACOperator
from torchlinop.parameters import ParameterLayout, match_names, match_regex
from torchlinop.space import VectorSpace

__all__ = [
    "BlockCoupling",
    "BlockDiagonalOperator",
    "CheckReport",
    "CountingOperator",
    "CurvatureOperator",
    "DiagonalOperator",
    "EKFACOperator",
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
    "MatrixOperator",
    "ParameterLayout",
    "ReverseOverReverse",
    "TorchlinopError",
    "TorchlinopWarning",
    "VectorSpace",
    "as_linear_operator",
    "block_coupling",
    "from_linear_operator",
    "ggn_diagonal",
    "match_names",
    "match_regex",
]

__version__ = "0.1.0"
