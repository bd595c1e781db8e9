"""K-FAC and EKFAC: which layers have a rule, what is collected, and what it makes of a matrix."""

from torchlinop.operators.kfac.kfac import EKFACOperator, KFACOperator

__all__ = ["EKFACOperator", "KFACOperator"]
