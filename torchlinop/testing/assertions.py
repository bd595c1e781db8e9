"""What a product has to satisfy, as assertions: finite, fixed, linear, symmetric, A ≥ 0, A = B.

Every ``A`` is anything that `as_operator` takes. Failures are AssertionErrors that give the defect
measured, what it was held to, and a reproducer. Defects are relative to the size of the products,
and held to ``rtol``: a thousand roundoffs of the dtype unless given, as products of networks round
more than those of matrices.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchlinop.algorithms.lanczos import lanczos
from torchlinop.errors import NotConvergedWarning
from torchlinop.operators.base import CurvatureOperator
from torchlinop.testing.subjects import as_operator

_ROUNDOFFS = 1000
_WIDTH = 8  # random columns at once
_DENSE = 256  # up to this size matrices are compared entry by entry
_FACTOR = 0.7548776662466927  # irrational, so that scaling by it rounds every product anew


def assert_finite(A: Any, *, products: int = 128, seed: int = 0, **how: Any) -> None:
    """No NaN or infinity in so many products with unit random vectors, one after the other."""
    op = as_operator(A, **how)
    for i in range(products):
        Av = op.matvec(_unit(op, 1, seed + i)[:, 0])
        bad = ~torch.isfinite(Av)
        if bad.any():
            raise AssertionError(
                f"product {i + 1} of {products} of {op!r} has {int(bad.sum())} of {op.size} "
                f"entries that are NaN or infinite, the first at {int(bad.nonzero()[0])}. "
                f"{_reproducer(seed + i, 1)}"
            )


def assert_deterministic(
    A: Any, *, products: int = 8, rtol: float | None = None, seed: int = 0, **how: Any
) -> None:
    """Products with one v are the same, whatever the global seeds of torch and NumPy."""
    op = as_operator(A, **how)
    v = _unit(op, 1, seed)[:, 0]
    first = op.matvec(v)
    for i in range(products - 1):
        with _global_seeds(seed + i):
            change = _size(op.matvec(v) - first)
        what = "repeating a product changes it by"
        _hold(op, what, change, _size(first), _bound(op, rtol), seed, 1)


@contextmanager
def _global_seeds(seed: int) -> Iterator[None]:
    """Other global random numbers of torch and NumPy, for the duration."""
    state = np.random.get_state()
    with torch.random.fork_rng():
        try:
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            yield
        finally:
            np.random.set_state(state)


def assert_linear(A: Any, *, rtol: float | None = None, seed: int = 0, **how: Any) -> None:
    """``A(u + c v) = A u + c A v``, also in blocks, for random vectors."""
    op = as_operator(A, **how)
    U, V = _unit(op, 2 * _WIDTH, seed).split(_WIDTH, dim=1)
    AU, AV = _columns(op, U), _columns(op, V)
    defect = _columns(op, U + _FACTOR * V) - AU - _FACTOR * AV
    scale = _size(AU) + _size(AV)
    _hold(
        op, "A(u + c v) - A u - c A v is", _size(defect), scale, _bound(op, rtol), seed, 2 * _WIDTH
    )
    block = op.matmat(U) - AU
    _hold(
        op, "a block of products differs from single ones by", _size(block), _size(AU),
        _bound(op, rtol), seed, 2 * _WIDTH,
    )  # fmt: skip


def assert_symmetric(A: Any, *, rtol: float | None = None, seed: int = 0, **how: Any) -> None:
    """``⟨u, A v⟩ = ⟨A u, v⟩`` for 64 pairs of random vectors: the dot test.

    An antisymmetric part E is seen as ‖E‖_F / n, against ‖A‖_F / √n.
    """
    op = as_operator(A, **how)
    U, V = _unit(op, 2 * _WIDTH, seed).split(_WIDTH, dim=1)
    AU, AV = op.matmat(U), op.matmat(V)
    defect = (U.mH @ AV - AU.mH @ V).abs().max()
    # A dot product of unit and A v with independent rounding errors loses 1/√n of them.
    scale = float(torch.maximum(op.space.norm(AU), op.space.norm(AV)).max()) / op.size**0.5
    _hold(op, "|<u, A v> - <A u, v>| is", float(defect), scale, _bound(op, rtol), seed, 2 * _WIDTH)


def assert_positive_semidefinite(
    A: Any, *, rtol: float | None = None, seed: int = 0, **how: Any
) -> None:
    """No eigenvalue below ``-rtol ‖A‖``, as far as Lanczos sees; a negative one is proved.

    Proof is the Rayleigh quotient of its vector, by a product of its own. Costs up to a few
    hundred products.
    """
    op = as_operator(A, **how)
    with warnings.catch_warnings():
        # An eigenvalue next to zero need not be known relative to itself.
        warnings.simplefilter("ignore", NotConvergedWarning)
        ends = lanczos(op, min(2, op.size), which="BE", seed=seed, tol=1e-3)
    x = ends.eigenvectors[:, ends.eigenvalues.argmin()].to(op.dtype)
    quotient = float((x.conj() @ op.matvec(x)).real / (x.conj() @ x).real)
    norm = float(ends.eigenvalues.abs().max())
    if quotient < -_bound(op, rtol) * norm:
        raise AssertionError(
            f"expected no negative eigenvalue of {op!r}, got x^T A x = {quotient:.6g} for a unit "
            f"vector x, where |A| is about {norm:.6g}. Reproduce: x = "
            f'lanczos(op, {min(2, op.size)}, which="BE", seed={seed}, tol=1e-3)'
        )


def assert_equal_operators(
    A: Any, B: Any, *, rtol: float | None = None, seed: int = 0, **how: Any
) -> None:
    """``A = B``: entry by entry up to n = 256, by rows of random products beyond.

    A wrong row is seen as such: the entry, or row, of the largest difference is named. ``rtol`` is
    relative to the largest entry, or the largest row norm; the coarser dtype sets its default.
    """
    a, b = as_operator(A, **how), as_operator(B, **how)
    if a.size != b.size:
        raise AssertionError(f"expected operators of one size, got {a.shape} and {b.shape}")
    bound = max(_bound(a, rtol), _bound(b, rtol))
    if a.size <= _DENSE:
        _assert_equal_entries(a, b, bound)
    else:
        _assert_equal_rows(a, b, bound, seed)


def _assert_equal_entries(a: CurvatureOperator, b: CurvatureOperator, bound: float) -> None:
    X, Y = _common(a.to_dense(), b.to_dense())
    difference = (X - Y).abs()
    scale = float(Y.abs().max())
    # ``not (≤)`` so that NaN comes to light.
    if not bool((difference <= bound * scale).all()):
        difference = difference.nan_to_num(torch.inf)
        i, j = divmod(int(difference.argmax()), a.size)
        wrong = int((difference > bound * scale).any(1).sum())
        raise AssertionError(
            f"{wrong} of {a.size} rows differ by more than rtol={bound:.1e} of the largest entry, "
            f"{scale:.6g}: entry ({i}, {j}) is {_number(X[i, j])} in {a!r} and "
            f"{_number(Y[i, j])} in {b!r}, a difference of {float(difference[i, j]):.3g}. "
            "Reproduce: A.to_dense() - B.to_dense()"
        )


def _assert_equal_rows(a: CurvatureOperator, b: CurvatureOperator, bound: float, seed: int) -> None:
    V = a.space.random(_WIDTH, seed)
    X, Y = _common(a.matmat(V), b.matmat(V.to(dtype=b.dtype, device=b.device)))
    rows = (X - Y).abs().amax(1)
    scale = float(Y.abs().max())
    if not bool((rows <= bound * scale).all()):
        rows = rows.nan_to_num(torch.inf)
        i, wrong = int(rows.argmax()), int((rows > bound * scale).sum())
        raise AssertionError(
            f"{wrong} of {a.size} rows of products with {_WIDTH} random vectors differ by more "
            f"than rtol={bound:.1e} of the largest entry, {scale:.6g}: row {i} by "
            f"{float(rows[i]):.3g}, between {a!r} and {b!r}. "
            f"{_reproducer(seed, _WIDTH)}"
        )


def _hold(  # noqa: PLR0917  # one for each word of the sentence
    op: CurvatureOperator,
    what: str,
    defect: float,
    scale: float,
    bound: float,
    seed: int,
    columns: int,
) -> None:
    # ``not (≤)`` so that NaN comes to light.
    if not defect <= bound * scale:
        relative = defect / scale if scale else float("inf")
        raise AssertionError(
            f"{what} {defect:.3g}, {relative:.1e} of the products, where rtol={bound:.1e} is "
            f"allowed: {op!r}. {_reproducer(seed, columns)}"
        )


def _reproducer(seed: int, columns: int) -> str:
    return (
        f"Reproduce: V = A.space.random({columns}, {seed}); V / V.norm(dim=0), "
        "with A = torchlinop.testing.as_operator(...)"
    )


def _unit(op: CurvatureOperator, columns: int, seed: int) -> Tensor:
    V = op.space.random(columns, seed)
    return V / op.space.norm(V)


def _columns(op: CurvatureOperator, V: Tensor) -> Tensor:
    return torch.stack([op.matvec(v) for v in V.unbind(1)], dim=1)


def _size(X: Tensor) -> float:
    return float(torch.linalg.vector_norm(X.flatten()))


def _bound(op: CurvatureOperator, rtol: float | None) -> float:
    return _ROUNDOFFS * torch.finfo(op.dtype).eps if rtol is None else rtol


def _common(X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    """Both on the CPU, in double precision."""
    dtype = torch.complex128 if X.is_complex() or Y.is_complex() else torch.float64
    return X.to("cpu", dtype), Y.to("cpu", dtype)


def _number(x: Tensor) -> str:
    return f"{complex(x) if x.is_complex() else float(x):.10g}"
