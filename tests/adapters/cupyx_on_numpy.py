"""The solver sources of the installed CuPy, executed over NumPy: no GPU, no driver, same lines.

``installed()`` puts stand-ins for CuPy and its CUDA libraries into ``sys.modules``. Arrays are
NumPy arrays that claim to lie on CUDA device 0; raw pointers, as handed to cuBLAS, are theirs.
"""

# ruff: noqa: PLR0917  # signatures of cuBLAS

import ctypes
import importlib.util
import sys
import types
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from unittest import mock

import numpy as np

SOURCES = "_interface", "_iterative", "_eigen", "_solve", "_lobpcg"
LINALG = "cupyx.scipy.sparse.linalg"


class Pointer:
    """What CuPy calls ``array.data``."""

    def __init__(self, array):
        self.ptr = array.ctypes.data


class Array(np.ndarray):
    """A NumPy array with the manners of CuPy's: entries are views, and memory is on a device."""

    log: ClassVar[list] = []  # of exchanges, and of what streams do
    place = (2, 0)  # CUDA, device 0

    @property
    def data(self):
        return Pointer(self)

    def __getitem__(self, index):
        entry = super().__getitem__(index)
        if not isinstance(entry, np.generic):
            return entry
        index = index if isinstance(index, tuple) else (index,)
        return super().__getitem__((*index, ...))

    def __array_wrap__(self, array, context=None, return_scalar=False):
        return super().__array_wrap__(array, context, False)  # numbers stay on the device

    def __dlpack_device__(self):
        return self.place

    def __dlpack__(self, *, stream=None, **options):
        Array.log.append(("x.__dlpack__",))
        return np.asarray(self).__dlpack__()

    @property
    def device(self):
        return types.SimpleNamespace(id=self.place[1])

    def get(self):
        return np.asarray(self)


def module(name, **contents):
    made = types.ModuleType(name)
    made.__dict__.update(contents)
    return made


def ours(function):
    """The function of NumPy, which gives an array of ours."""

    def wrapped(*args, **kwargs):
        return as_arrays(function(*args, **kwargs))

    return wrapped


def as_arrays(result):
    if isinstance(result, tuple):
        return tuple(as_arrays(r) for r in result)
    return np.asarray(result).view(Array) if isinstance(result, np.ndarray | np.generic) else result


@dataclass(frozen=True)
class Stream:
    """A stream of either library, by its pointer."""

    cuda_stream: int

    @property
    def ptr(self):
        return self.cuda_stream

    def wait_stream(self, other):
        Array.log.append(("wait", self.ptr, other.ptr))


@contextmanager
def on_streams(of_torch=0, of_cupy=0):
    """Both libraries on these streams of a device that is none, with a log of what they do."""
    with ExitStack() as stack:
        for name, stand_in in {
            "torch.cuda.device": lambda device: nullcontext(),
            "torch.cuda.current_stream": lambda device=None: Stream(of_torch),
            "torch.cuda.default_stream": lambda device=None: Stream(0),
            "torch.cuda.ExternalStream": lambda pointer, device=None: Stream(pointer),
            "torch.Tensor.record_stream": lambda y, s: Array.log.append(("record", s.ptr)),
        }.items():
            stack.enter_context(mock.patch(name, stand_in))
        cuda = sys.modules["cupy"].cuda
        stack.enter_context(
            mock.patch.object(cuda, "get_current_stream", return_value=Stream(of_cupy))
        )
        Array.log.clear()
        yield Array.log


def from_dlpack(tensor):
    Array.log.append(("y.__dlpack__", sys.modules["cupy"].cuda.get_current_stream().ptr))
    return np.from_dlpack(tensor).view(Array)


def at(pointer, n, char, stride=1):
    """The memory of n numbers at a raw pointer, as cuBLAS sees it."""
    dtype = np.dtype(char)
    buffer = (ctypes.c_char * (dtype.itemsize * n * stride)).from_address(pointer)
    return np.frombuffer(buffer, dtype)[::stride]


def scalar(pointer, char):
    return at(pointer, 1, char)[0]


def level_one(char):
    """dot, nrm2, gemv and axpy of one dtype, with the signatures of cuBLAS."""

    def dot(handle, n, x, incx, y, incy, result):
        at(result, 1, char)[0] = np.vdot(at(x, n, char, incx), at(y, n, char, incy))

    def nrm2(handle, n, x, incx, result):
        at(result, 1, char.lower())[0] = np.linalg.norm(at(x, n, char, incx))

    def gemv(handle, trans, m, n, alpha, A, lda, x, incx, beta, y, incy):
        A = at(A, lda * n, char).reshape(n, lda)[:, :m].T
        A = A if trans == 0 else A.conj().T
        y = at(y, A.shape[0], char, incy)
        kept = scalar(beta, char)
        product = scalar(alpha, char) * (A @ at(x, A.shape[1], char, incx))
        y[...] = product + kept * y if kept else product

    def axpy(handle, n, alpha, x, incx, y, incy):
        at(y, n, char, incy)[...] += scalar(alpha, char) * at(x, n, char, incx)

    return dot, nrm2, gemv, axpy


def raw_cublas():
    made = module(
        "cupy_backends.cuda.libs.cublas",
        CUBLAS_OP_N=0,
        CUBLAS_OP_C=2,
        CUBLAS_POINTER_MODE_DEVICE=1,
        getPointerMode=lambda handle: 0,
        setPointerMode=lambda handle, mode: None,
    )
    for char, dot, norm in zip(
        "fdFD", ("dot", "dot", "dotc", "dotc"), ("s", "d", "sc", "dz"), strict=True
    ):
        prefix = {"f": "s", "d": "d", "F": "c", "D": "z"}[char]
        functions = level_one(char)
        names = prefix + dot, norm + "nrm2", prefix + "gemv", prefix + "axpy"
        made.__dict__.update(zip(names, functions, strict=True))
    return made


def dotc(x, y, out=None):
    assert x.dtype == y.dtype, "cuBLAS takes one dtype"
    # The strides are not looked at: what is not contiguous is read wrong, as it is by cuBLAS.
    flat = [at(v.ctypes.data, v.size, v.dtype.char) for v in (x, y)]
    return given(np.vdot(*flat), out)


def nrm2(x, out=None):
    return given(np.linalg.norm(at(x.ctypes.data, x.size, x.dtype.char)), out)


def given(value, out):
    if out is None:
        return as_arrays(value)
    out[...] = value
    return out


def gemv(trans, alpha, A, x, beta, y):
    assert A.dtype == x.dtype == y.dtype, "cuBLAS takes one dtype"
    A = np.asarray(A).conj().T if trans == 2 else np.asarray(A)
    y = at(y.ctypes.data, A.shape[0], y.dtype.char)  # in place, whatever the strides say
    product = alpha * (A @ at(x.ctypes.data, A.shape[1], x.dtype.char))
    y[...] = product + beta * y if beta else product


def elementwise_kernel(inputs, outputs, operation, name):
    """The one kernel that these sources define."""
    assert operation == "v = u / beta[j]; V[i + (j+1) * n] = v;", operation

    def normalize(u, beta, j, n, v, V):
        with np.errstate(divide="ignore", invalid="ignore"):
            v[...] = np.asarray(u) / np.asarray(beta)[j]
        V[j + 1] = v

    return normalize


HOST = "isscalar", "finfo", "result_type"  # functions that give no arrays
LINEAR_ALGEBRA = "norm", "eigh", "cholesky", "inv", "solve"


def numpys_cupy():
    """A module like CuPy, on NumPy. Memory that is not written yet is zero, for tests to repeat."""
    functions = {name: getattr(np, name) for name in np.__all__ if hasattr(np, name)}
    for name, function in functions.items():
        if not (isinstance(function, type) or name in HOST) and callable(function):
            functions[name] = ours(function)
    made = module("cupy", **functions)
    linalg = module("cupy.linalg", **{f: ours(getattr(np.linalg, f)) for f in LINEAR_ALGEBRA})
    linalg._util = module("cupy.linalg._util")
    runtime = module("cupy.cuda.runtime")
    device = module("cupy.cuda.device", get_cublas_handle=lambda: 0)
    cuda = module(
        "cupy.cuda",
        device=device,
        runtime=runtime,
        get_current_stream=lambda: Stream(0),
        is_available=lambda: True,
        Device=lambda: types.SimpleNamespace(id=0),
    )
    cublas = module("cupy.cublas", dotc=dotc, nrm2=nrm2, gemv=gemv)
    random = module("cupy.random", random=ours(np.random.default_rng(0).random))
    core = module("cupy._core", _dtype=module("cupy._core._dtype"))
    made.__dict__.update(
        __version__="on NumPy", ndarray=Array, linalg=linalg, cuda=cuda, cublas=cublas, _core=core,
        random=random, asnumpy=np.asarray, from_dlpack=from_dlpack,
        ElementwiseKernel=elementwise_kernel, empty=ours(np.zeros),
    )  # fmt: skip
    return made


def stand_ins():
    """What the sources import, by name."""
    cupy = numpys_cupy()
    util = module(
        "cupyx.scipy.sparse._util",
        isshape=lambda shape: len(shape) == 2 and all(int(n) == n for n in shape),
        isintlike=lambda n: int(n) == n,
    )
    csr = module("cupyx.scipy.sparse._csr", _is_csr=lambda A: False)
    sparse = module("cupyx.scipy.sparse", _util=util, _csr=csr, issparse=lambda A: False)
    linalg = module(LINALG, __path__=[])
    cusparse = module("cupyx.cusparse", check_availability=lambda name: False)
    cublas = raw_cublas()
    libs = module("cupy_backends.cuda.libs", cublas=cublas, cusparse=module("cusparse"))
    modules = [
        cupy, cupy.linalg, cupy.linalg._util, cupy.cuda, cupy.cuda.device, cupy.cuda.runtime,
        cupy.cublas, cupy.random, cupy._core, cupy._core._dtype, util, csr, sparse, linalg,
        cusparse, cublas, libs, module("cupyx", cusparse=cusparse), module("cupyx.scipy"),
        module("cupy_backends"), module("cupy_backends.cuda"),
    ]  # fmt: skip
    sparse.linalg = linalg
    return {m.__name__: m for m in modules} | {"cupy_backends.cuda.libs.cusparse": libs.cusparse}


def found():
    """The folder of the solver sources, or None where CuPy is not installed."""
    spec = importlib.util.find_spec("cupyx")
    return Path(spec.origin).parent / "scipy" / "sparse" / "linalg" if spec else None


@contextmanager
def installed():
    """``cupyx.scipy.sparse.linalg`` with every iterative solver, over NumPy."""
    folder = found()
    hidden = {name for name in sys.modules if name.partition(".")[0] in ("cupy", "cupyx")}
    with mock.patch.dict(sys.modules, stand_ins()):
        for name in hidden - set(stand_ins()):
            del sys.modules[name]
        linalg = sys.modules[LINALG]
        for source in SOURCES:
            name = f"{LINALG}.{source}"
            spec = importlib.util.spec_from_file_location(name, folder / f"{source}.py")
            loaded = importlib.util.module_from_spec(spec)
            sys.modules[name] = loaded
            setattr(linalg, source, loaded)
            spec.loader.exec_module(loaded)
            public = (n for n in loaded.__dict__ if not n.startswith("_"))
            linalg.__dict__.update({n: getattr(loaded, n) for n in public})
        yield linalg
