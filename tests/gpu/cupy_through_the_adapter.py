"""A plugin of pytest: whatever cupyx makes an operator of, real and floating, becomes one of ours.

CuPy's own tests of its solvers, run with it, are then tests of the adapter.
"""

import importlib

from torchlinop.adapters.cupy import cupy_operator
from torchlinop.adapters.cupy_memory import copy_of_cupy, cupy_of, tensor_of_cupy
from torchlinop.operators.rectangular import RectangularOperator
from torchlinop.space import VectorSpace


class Given(RectangularOperator):
    """A matrix of CuPy, dense or sparse, which need not be symmetric."""

    def __init__(self, matrix, dtype, device):
        super().__init__(*(VectorSpace(n, dtype, device) for n in matrix.shape))
        self.matrix = matrix

    def _matmat(self, V):
        return copy_of_cupy(self.matrix @ cupy_of(V), self.space.device)

    def _rmatmat(self, U):
        return copy_of_cupy(self.matrix.T @ cupy_of(U), self.space.device)


def through_the_adapter(original):
    """In place of ``aslinearoperator``: what it is not for goes to the original."""

    def aslinearoperator(A):
        operator = original(A)
        plain = hasattr(A, "shape") and not isinstance(A, type(operator))
        if not plain or A.dtype.char not in "fd" or 0 in A.shape:
            return operator
        probe = tensor_of_cupy(_vector(A.dtype), _device())
        return cupy_operator(Given(A, probe.dtype, probe.device))

    return aslinearoperator


def _vector(dtype):
    return importlib.import_module("cupy").zeros(1, dtype)


def _device():
    return importlib.import_module("torch").device("cuda:0")


def pytest_configure(config):
    interface = importlib.import_module("cupyx.scipy.sparse.linalg._interface")
    interface.aslinearoperator = through_the_adapter(interface.aslinearoperator)
    public = importlib.import_module("cupyx.scipy.sparse.linalg")
    public.aslinearoperator = interface.aslinearoperator
