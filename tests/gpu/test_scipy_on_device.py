"""Every solver of SciPy over an operator on the device: the tests of the adapter, moved there.

The functions of tests/adapters/test_scipy_solvers.py are loaded again, with operators that lie on
the device in place of those on the CPU. The dense answers stay NumPy's.
"""

import copy
import importlib.util
import inspect
from pathlib import Path
from unittest import mock

from on_device import DEVICE, anywhere

import torchlinop

pytestmark = anywhere
SOURCE = Path(__file__).parents[1] / "adapters" / "test_scipy_solvers.py"


def matrix_there(matrix):
    return torchlinop.MatrixOperator(matrix.to(DEVICE))


def products_there(n, product, dtype):
    """Products of a matrix that stays on the CPU."""
    return torchlinop.LambdaOperator(
        n, lambda v: product(v.cpu()).to(DEVICE), dtype=dtype, device=DEVICE
    )


def hessian_there(model, batches, loss_fn):
    return torchlinop.HessianOperator(copy.deepcopy(model).to(DEVICE), batches, loss_fn)


def loaded():
    there = {
        "MatrixOperator": matrix_there,
        "LambdaOperator": products_there,
        "HessianOperator": hessian_there,
    }
    spec = importlib.util.spec_from_file_location("scipy_solvers_on_device", SOURCE)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.multiple(torchlinop, **there):
        spec.loader.exec_module(module)
    return module


# The functions above look names up in torchlinop when they are called, after the patch is gone.
for name, function in inspect.getmembers(loaded(), inspect.isfunction):
    if name.startswith("test_"):
        globals()[name] = function
# Reads the matrix of its operator back with NumPy, which only memory of the CPU allows.
if DEVICE.type != "cpu":
    del globals()["test_eigsh_finds_the_eigenpairs_of_a_hermitian_matrix"]
