"""What can go wrong, as exceptions that say what was expected, what came, and what to do."""

import sys
import warnings


class TorchlinopError(Exception):
    """Base class of every error raised by torchlinop."""


class VectorError(TorchlinopError, ValueError):
    """A vector or block has the wrong shape, dtype, device or memory."""


class OptionError(TorchlinopError, ValueError):
    """An option has a value that is not among its choices."""


class ParameterError(TorchlinopError, ValueError):
    """A parameter cannot be part of a flat real vector."""


class NoParametersError(ParameterError):
    """No parameter is left to differentiate with respect to."""


class DataError(TorchlinopError, ValueError):
    """The data do not define a fixed matrix."""


class EmptyDataError(DataError):
    """The data hold no batch, or no loss term."""


class OneShotDataError(DataError):
    """The data can be read only once, but every product reads them again."""


class NonDeterministicDataError(DataError):
    """Two passes over the data gave two different objectives."""


class BatchError(DataError):
    """A batch has a form that cannot be counted, split or moved."""


class WeightingError(DataError):
    """It is unknown how much each batch counts in the mean."""


class SampleMixingError(WeightingError):
    """Samples depend on each other where a matrix of per-sample gradients is wanted."""


class LossShapeError(TorchlinopError, ValueError):
    """The loss is not a differentiable scalar."""


class DoubleBackwardError(TorchlinopError, RuntimeError):
    """An operation of the model has no second derivative."""


class CheckpointError(DoubleBackwardError):
    """Activation checkpointing stands in the way of second derivatives."""


class CaptureError(TorchlinopError, RuntimeError):
    """A product cannot be written down as one program, to be run without Python or autograd."""


class NonFiniteError(TorchlinopError, ArithmeticError):
    """A loss, gradient or product holds NaN or infinity."""


class SymmetryError(TorchlinopError, ArithmeticError):
    """A matrix that should be symmetric, linear or repeatable is not."""


class DefinitenessError(TorchlinopError, ArithmeticError):
    """A matrix that should have no negative eigenvalue has one."""


class ProductBudgetError(TorchlinopError, RuntimeError):
    """A solver asked for more products than it was granted."""


class MemoryEstimateError(TorchlinopError, MemoryError):
    """What is about to be allocated does not fit into the memory that is free."""


class NotConvergedError(TorchlinopError, ArithmeticError):
    """A solver stopped before its answer was as accurate as asked; it carries the answer."""

    def __init__(self, message: str, result: object = None) -> None:
        super().__init__(message)
        self.result = result


class KFACCoverageError(TorchlinopError, ValueError):
    """K-FAC knows no factors for some of the selected parameters."""


class ShardingError(TorchlinopError, ValueError):
    """A model is sharded in a way, or by a version of torch, that is not known here."""


class ProcessGroupError(TorchlinopError, RuntimeError):
    """There is no process group, or its ranks do not fit together."""


class RankError(TorchlinopError, RuntimeError):
    """Another rank failed, with an error that cannot be raised again as it was."""


class DivergenceError(TorchlinopError, RuntimeError):
    """Ranks that should take the same steps do not: their vectors differ."""


class TorchlinopWarning(UserWarning):
    """Base class of every warning given by torchlinop."""


class TrainModeWarning(TorchlinopWarning):
    """The model is in training mode, but the matrix is that of evaluation mode."""


class UnusedParameterWarning(TorchlinopWarning):
    """Some selected parameters do not influence the loss: their rows are zero."""


class PrecisionWarning(TorchlinopWarning):
    """Products are noisier than the dtype of the vectors suggests."""


class NotConvergedWarning(TorchlinopWarning):
    """A solver has spent its products before it reached the accuracy asked for."""


class OrthogonalityWarning(TorchlinopWarning):
    """Without reorthogonalisation against all vectors, eigenvalues come in copies."""


def warn_caller(message: str, category: type[TorchlinopWarning]) -> None:
    """Warn at the line outside of this package that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("torchlinop."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
