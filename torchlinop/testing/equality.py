"""``A = B``, for two operators of any kinds: entry by entry, or by the rows of random products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchlinop.operators.base import CurvatureOperator
from torchlinop.testing.trial import Trial

_WIDTH = 8  # random columns at once
_DENSE = 256  # up to this size matrices are compared entry by entry


def assert_equal_operators(
    A: Any, B: Any, *, rtol: float | None = None, seed: int = 0, **how: Any
) -> None:
    """``A = B``: entry by entry up to n = 256, by rows of random products beyond.

    A wrong row is seen as such: the entry, or row, of the largest difference is named. ``rtol`` is
    relative to the largest entry, or the largest entry of the products; the coarser dtype sets its
    default. A function takes the ``size`` of the other operand, unless given.
    """
    how = {**_size_of(A, B), **how}
    a, b = Trial.of(A, seed, how), Trial.of(B, seed, how)
    if a.op.size != b.op.size:
        raise AssertionError(f"expected operators of one size, got {a.op.shape} and {b.op.shape}")
    bound = max(a.bound(rtol), b.bound(rtol))
    if a.op.size <= _DENSE:
        _assert_equal_entries(a, b, bound)
    else:
        _assert_equal_rows(a, b, bound)


def _size_of(*operands: Any) -> dict[str, int]:
    shapes = [A.shape for A in operands if hasattr(A, "shape")]
    functions = len(shapes) < len(operands)
    return {"size": int(shapes[0][0])} if shapes and functions else {}


def _assert_equal_entries(a: Trial, b: Trial, bound: float) -> None:
    X, Y = _common(a.op.to_dense(), b.op.to_dense())
    wrong = _wrong(X, Y, bound)
    if wrong.any():
        i, j = _worst(X, Y)
        a.fail(
            f"{int(wrong.sum())} of {a.op.size} rows differ by more than rtol={bound:.1e} of the "
            f"largest entry, {_largest(Y):.6g}: entry ({i}, {j}) is {_number(X[i, j])} against "
            f"{_number(Y[i, j])}, a difference of {_number((X - Y)[i, j].abs(), 3)}",
            [f"print(A.to_dense()[{i}, {j}].item() - B.to_dense()[{i}, {j}].item())"],
            other=b,
        )


def _assert_equal_rows(a: Trial, b: Trial, bound: float) -> None:
    V = _coarser(a.op, b.op).space.random(_WIDTH, a.seed)
    X, Y = _common(_products(a.op, V), _products(b.op, V))
    wrong = _wrong(X, Y, bound)
    if wrong.any():
        i, j = _worst(X, Y)
        a.fail(
            f"{int(wrong.sum())} of {a.op.size} rows of products with {_WIDTH} random vectors "
            f"differ by more than rtol={bound:.1e} of the largest entry, {_largest(Y):.6g}: "
            f"row {i} by {_number((X - Y)[i, j].abs(), 3)}, being {_number(X[i, j])} against "
            f"{_number(Y[i, j])}",
            [
                f"V = A.space.random({_WIDTH}, {a.seed})",
                "AV, BV = A @ V, B @ V.to(B.dtype).to(B.device)",
                f"print(AV[{i}, {j % _WIDTH}].item() - BV[{i}, {j % _WIDTH}].item())",
            ],
            other=b,
        )


def _products(op: CurvatureOperator, V: Tensor) -> Tensor:
    """A V (n, k), and A v of the first column once more, alone."""
    V = V.to(dtype=op.dtype, device=op.device)
    return torch.cat([op.matmat(V), op.matvec(V[:, 0])[:, None]], dim=1)


def _coarser(a: CurvatureOperator, b: CurvatureOperator) -> CurvatureOperator:
    """Whose vectors the other represents without rounding."""
    return min(a, b, key=lambda op: (op.dtype.is_complex, -torch.finfo(op.dtype).eps))


def _common(X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    """Both on the CPU, in double precision."""
    dtype = torch.complex128 if X.is_complex() or Y.is_complex() else torch.float64
    return X.to("cpu", dtype), Y.to("cpu", dtype)


def _wrong(X: Tensor, Y: Tensor, bound: float) -> Tensor:
    """The rows (n,) with an entry that differs."""
    # ``not (≤)`` so that NaN comes to light.
    return ~((X - Y).abs() <= bound * _largest(Y)).all(1)


def _worst(X: Tensor, Y: Tensor) -> tuple[int, int]:
    return divmod(int((X - Y).abs().nan_to_num(torch.inf, torch.inf).argmax()), X.shape[1])


def _largest(Y: Tensor) -> float:
    """Of the finite entries: an infinite one would excuse every difference."""
    return float(Y.abs().nan_to_num(0.0, 0.0).max())


def _number(x: Tensor, digits: int = 10) -> str:
    return f"{complex(x) if x.is_complex() else float(x):.{digits}g}"
