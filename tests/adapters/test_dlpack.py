"""One memory, seen by torch and by NumPy: shared where both allow it, copied where one does not."""

import numpy as np
import pytest
import torch
from torch import nn

from torchlinop.adapters.dlpack import array_of, host_array, numpy_dtype, tensor_of, torch_dtype
from torchlinop.errors import VectorError

CPU = torch.device("cpu")


def entries(*shape, dtype=np.float64):
    """Distinct integers, which every dtype with eight bits of mantissa holds exactly."""
    values = 1 + np.arange(np.prod(shape)).reshape(shape)
    return (values * (1 + 2j) if np.dtype(dtype).kind == "c" else values).astype(dtype)


def misaligned(x):
    memory = np.zeros(x.nbytes + 1, np.uint8)[1:]
    moved = memory.view(x.dtype).reshape(x.shape)
    moved[...] = x
    return moved


def read_only(x):
    x.flags.writeable = False
    return x


def field_of_records(x):
    """``x`` as one field of packed records: its strides are no multiple of its item size."""
    records = np.zeros(x.shape, np.dtype([("tag", x.real.dtype), ("value", x.dtype)]))
    records["value"] = x
    return records["value"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize(
    "arrange",
    [
        pytest.param(lambda x: x, id="C"),
        pytest.param(np.asfortranarray, id="F"),
        pytest.param(lambda x: x[:, 0], id="column"),
        pytest.param(lambda x: x[1:5, ::2], id="strided"),
        pytest.param(lambda x: x.T[1:], id="transposed-slice"),
        pytest.param(lambda x: x[:, :1], id="n-by-1"),
    ],
)
def test_tensor_is_the_memory_of_an_array_with_positive_strides(dtype, arrange):
    x = arrange(entries(6, 4, dtype=numpy_dtype(dtype)))
    t = tensor_of(x, dtype, CPU)
    assert t.data_ptr() == x.ctypes.data
    np.testing.assert_array_equal(t.numpy(), x, strict=True)


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(read_only(entries(6, 4)), id="read-only"),
        pytest.param(np.broadcast_to(entries(6, 1), (6, 4)), id="broadcast"),
        pytest.param(entries(6, 4)[::-1], id="reversed-rows"),
        pytest.param(entries(6, 4, dtype=np.int64).view(np.matrix), id="np.matrix"),
        pytest.param(entries(6, 4)[:, ::-1], id="reversed-columns"),
        pytest.param(misaligned(entries(6, 4)), id="misaligned"),
        pytest.param(entries(6, 4, dtype=">f8"), id="big-endian"),
        pytest.param(entries(6, 4, dtype=np.int64), id="int64"),
        pytest.param(entries(6, 4, dtype=np.int8), id="int8"),
        pytest.param(entries(6, 4) > 7, id="bool"),
        pytest.param(entries(6, 4, dtype=np.float16), id="float16"),
        pytest.param(entries(6, 4, dtype=np.float32), id="float32"),
        pytest.param(entries(6, 4, dtype=np.longdouble), id="longdouble"),
    ],
)
def test_tensor_is_a_copy_where_memory_cannot_be_shared(x):
    t = tensor_of(x, torch.float64, CPU)
    assert t.dtype == torch.float64
    assert not np.shares_memory(t.numpy(), x)
    np.testing.assert_array_equal(t.numpy(), x.astype(np.float64), strict=True)


@pytest.mark.parametrize(
    ("dtype", "exchanged"), [(torch.complex64, np.complex64), (torch.complex128, np.complex128)]
)
def test_tensor_copies_complex_numbers_whose_strides_are_no_multiple_of_their_size(
    dtype, exchanged
):
    # A complex number is aligned like its real part: such an array counts as aligned.
    x = field_of_records(entries(6, dtype=exchanged))[1:]
    np.testing.assert_array_equal(tensor_of(x, dtype, CPU).numpy(), x, strict=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [np.float32, np.float64, np.int64])
def test_tensor_of_half_precision_holds_the_rounded_entries(dtype, given):
    x = entries(6, 4, dtype=given)
    t = tensor_of(x, dtype, CPU)
    assert t.dtype == dtype
    np.testing.assert_array_equal(t.double().numpy(), x.astype(np.float64))


@pytest.mark.parametrize("shape", [(6, 0), (0, 4)])
def test_tensor_of_an_empty_block_has_its_shape(shape):
    assert tensor_of(np.zeros(shape), torch.float64, CPU).shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize(
    "arrange",
    [
        pytest.param(lambda t: t, id="C"),
        pytest.param(lambda t: t.mT, id="F"),
        pytest.param(lambda t: t[2:5], id="rows"),
        pytest.param(lambda t: t[0], id="vector"),
        pytest.param(lambda t: t[3:, :1].mT, id="1-by-n-of-one"),
    ],
)
def test_array_is_the_memory_of_a_contiguous_tensor(dtype, arrange):
    t = arrange(torch.from_numpy(entries(4, 6, dtype=numpy_dtype(dtype))))
    y = array_of(t)
    assert y.ctypes.data == t.data_ptr()
    np.testing.assert_array_equal(y, t.numpy(), strict=True)


def complex_tensor():
    return torch.from_numpy(entries(6, 4, dtype=np.complex128))


def real_tensor():
    return torch.from_numpy(entries(6, 4))


def inference_tensor():
    with torch.inference_mode():
        return real_tensor() * 1


SPECIAL_TENSORS = [
    pytest.param(lambda: complex_tensor().conj(), entries(6, 4) * (1 - 2j), id="conj-bit"),
    pytest.param(lambda: complex_tensor().mH, (entries(6, 4) * (1 - 2j)).T, id="adjoint"),
    pytest.param(lambda: complex_tensor().conj().imag, entries(6, 4) * -2, id="neg-bit"),
    pytest.param(lambda: real_tensor()[:, :1].expand(6, 3), entries(6, 4)[:, [0] * 3], id="expand"),
    pytest.param(lambda: real_tensor()[:, 1], entries(6, 4)[:, 1], id="column"),
    pytest.param(lambda: real_tensor()[::2, 1:3], entries(6, 4)[::2, 1:3], id="slice"),
    pytest.param(lambda: real_tensor().flip(0), entries(6, 4)[::-1], id="flip"),
    pytest.param(lambda: real_tensor().requires_grad_(), entries(6, 4), id="requires-grad"),
    pytest.param(lambda: real_tensor().requires_grad_() * 2, 2 * entries(6, 4), id="non-leaf"),
    pytest.param(lambda: nn.Parameter(real_tensor()), entries(6, 4), id="parameter"),
    pytest.param(inference_tensor, entries(6, 4), id="inference"),
    pytest.param(lambda: real_tensor().bfloat16(), entries(6, 4, dtype=np.float32), id="bfloat16"),
    pytest.param(lambda: real_tensor().half().mT, entries(6, 4, dtype=np.float32).T, id="float16"),
    pytest.param(lambda: real_tensor()[:, :0], entries(6, 4)[:, :0], id="empty"),
]


@pytest.mark.parametrize(("make", "expected"), SPECIAL_TENSORS)
def test_array_holds_the_values_of_the_tensor(make, expected):
    np.testing.assert_array_equal(array_of(make()), expected, strict=True)


@pytest.mark.parametrize(("make", "expected"), SPECIAL_TENSORS)
def test_array_is_writable_and_contiguous(make, expected):
    flags = array_of(make()).flags
    assert flags.writeable
    assert flags.c_contiguous or flags.f_contiguous


class OnTheGPU:
    """What CuPy's arrays and torch's CUDA tensors have in common."""

    @property
    def __cuda_array_interface__(self):
        return {"shape": (3,), "typestr": "<f8", "data": (0, False), "version": 3}


def test_an_array_on_the_gpu_is_refused_by_name():
    with pytest.raises(
        VectorError,
        match=r"expected a NumPy array, got a .*OnTheGPU on the GPU; bring",
    ):
        host_array(OnTheGPU())


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(np.array([[1.0], [2.0]]).view(np.matrix), id="np.matrix"),
        pytest.param([[1.0], [2.0]], id="list"),
        pytest.param(torch.tensor([[1.0], [2.0]], dtype=torch.float64), id="tensor"),
    ],
)
def test_host_array_is_a_plain_ndarray(x):
    a = host_array(x)
    assert type(a) is np.ndarray
    np.testing.assert_array_equal(a, np.array([[1.0], [2.0]]), strict=True)


def test_host_array_of_an_ndarray_is_that_array():
    x = entries(6)
    assert host_array(x) is x


@pytest.mark.parametrize(
    ("given", "computes_in"),
    [
        (np.float32, torch.float32),
        (">f4", torch.float32),
        (np.float64, torch.float64),
        (np.complex64, torch.complex64),
        (">c8", torch.complex64),
        (np.complex128, torch.complex128),
        (np.clongdouble, torch.complex128),
        (np.longdouble, torch.float64),
        (np.float16, torch.float64),
        (np.int64, torch.float64),
        (np.bool_, torch.float64),
        (None, torch.float64),
    ],
)
def test_numpy_dtypes_compute_in_the_torch_dtype_that_holds_them(given, computes_in):
    assert torch_dtype(given) == computes_in


@pytest.mark.parametrize("dtype", [torch.complex32, torch.float8_e4m3fn])
def test_dtypes_that_numpy_cannot_exchange_are_refused(dtype):
    with pytest.raises(VectorError, match=f"got {dtype}; build it in float32"):
        numpy_dtype(dtype)
