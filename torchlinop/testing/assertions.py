"""What a product has to satisfy, as assertions: finite, fixed, linear, symmetric, A ≥ 0.

Every ``A`` is anything that `as_operator` takes, and ``how`` its ``size`` and ``dtype``. Failures
are AssertionErrors with the defect measured, what it was held to, the seed, and lines of Python
that show it again. Defects are relative to the size of the products, and held to ``rtol``: a
thousand roundoffs of the dtype unless given, as products of networks round more than those of
matrices.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchlinop.algorithms.lanczos import lanczos
from torchlinop.errors import NotConvergedWarning
from torchlinop.operators.base import CurvatureOperator
from torchlinop.random_state import preserved_random_state, reseed
from torchlinop.testing.trial import Trial, sizes

_WIDTH = 8  # random columns at once
_DENSE = 256  # up to this size the eigenvalues are those of the matrix
_FACTOR = 0.7548776662466927  # irrational, so that scaling by it rounds every product anew


def assert_finite(A: Any, *, products: int = 128, seed: int = 0, **how: Any) -> None:
    """No NaN or infinity in so many products with unit random vectors, and in one block of 8."""
    trial = Trial.of(A, seed, how)
    for i in range(products):
        v = replace(trial, seed=seed + i).unit(1)[:, 0]
        bad = ~torch.isfinite(trial.op.matvec(v))
        if bad.any():
            trial.fail(
                f"product {i + 1} of {products} has {int(bad.sum())} of {trial.op.size} entries "
                f"that are NaN or infinite, the first at {int(bad.nonzero()[0])}",
                [
                    f"for i in range({i + 1}):",
                    f"    v = A.space.random(1, {seed} + i)[:, 0]; Av = A @ (v / v.norm())",
                    "print(int((~Av.isfinite()).sum()))",
                ],
            )
    bad = ~torch.isfinite(trial.op.matmat(trial.unit(_WIDTH)))
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        trial.fail(
            f"a block of {_WIDTH} products has {int(bad.sum())} entries that are NaN or infinite, "
            f"the first at ({row}, {column})",
            [trial.unit_line(_WIDTH), "print(int((~A.matmat(V).isfinite()).sum()))"],
        )


def assert_deterministic(
    A: Any, *, products: int = 8, rtol: float | None = None, seed: int = 0, **how: Any
) -> None:
    """Products with one v, and with one block, do not depend on when they are taken.

    The global seeds of torch, NumPy and Python are others at each. ``rtol=0`` asks for equal bits.
    """
    trial = Trial.of(A, seed, how)
    V = trial.unit(_WIDTH)
    _assert_repeated(trial, "a product", trial.op.matvec, V[:, 0], products, rtol)
    _assert_repeated(trial, "a block of products", trial.op.matmat, V, 2, rtol)


def _assert_repeated(  # noqa: PLR0917  # one for each word of the sentence
    trial: Trial,
    what: str,
    product: Callable[[Tensor], Tensor],
    V: Tensor,
    products: int,
    rtol: float | None,
) -> None:
    first = product(V)
    argument = "V[:, 0]" if V.ndim == 1 else "V"
    for i in range(products - 1):
        with _global_seeds(trial.seed + i, trial.op.device):
            change = product(V) - first
        trial.hold(
            f"repeating {what} changes it by",
            sizes(change.view(len(V), -1)),
            sizes(first.view(len(V), -1)),
            trial.bound(rtol),
            [
                trial.unit_line(_WIDTH),
                f"first = A @ {argument}",
                f"print([float((A @ {argument} - first).norm()) for _ in range({products})])",
            ],
        )


@contextmanager
def _global_seeds(seed: int, device: torch.device) -> Iterator[None]:
    """Other global random numbers of torch, NumPy and Python, for the duration."""
    with preserved_random_state(device):
        reseed(seed % 2**32, device)  # NumPy takes no larger ones
        yield


def assert_linear(A: Any, *, rtol: float | None = None, seed: int = 0, **how: Any) -> None:
    """``A(u + c v) = A u + c A v`` for 8 pairs of random vectors, and blocks are their columns."""
    trial = Trial.of(A, seed, how)
    U, V = trial.unit(2 * _WIDTH).split(_WIDTH, dim=1)
    AU, AV = _columns(trial.op, U), _columns(trial.op, V)
    pairs, bound = trial.unit_line(2 * _WIDTH), trial.bound(rtol)
    trial.hold(
        "A(u + c v) - A u - c A v is",
        sizes(_columns(trial.op, U + _FACTOR * V) - AU - _FACTOR * AV),
        sizes(AU) + sizes(AV),
        bound,
        [
            pairs,
            f"u, v, c = V[:, {{i}}], V[:, {_WIDTH} + {{i}}], {_FACTOR}",
            "print(float((A @ (u + c * v) - A @ u - c * (A @ v)).norm()))",
        ],
    )
    trial.hold(
        "a block of products differs from single ones by",
        sizes(trial.op.matmat(U) - AU),
        sizes(AU),
        bound,
        [pairs, f"print(float(((A @ V[:, :{_WIDTH}])[:, {{i}}] - A @ V[:, {{i}}]).norm()))"],
    )


def assert_symmetric(A: Any, *, rtol: float | None = None, seed: int = 0, **how: Any) -> None:
    """``⟨u, A v⟩ = ⟨A u, v⟩`` for 64 pairs of random vectors: the dot test.

    An antisymmetric part E is seen as ‖E‖_F / n, against ‖A‖_F / √n.
    """
    trial = Trial.of(A, seed, how)
    U, V = trial.unit(2 * _WIDTH).split(_WIDTH, dim=1)
    AU, AV = trial.op.matmat(U), trial.op.matmat(V)
    defects = (_inner(U, AV) - _inner(AU, V)).abs().cpu()
    # A dot product of unit and A v with independent rounding errors loses 1/√n of them.
    scale = torch.maximum(sizes(AU).max(), sizes(AV).max()) / trial.op.size**0.5
    j = int(defects.nan_to_num(torch.inf).amax(0).argmax())
    trial.hold(
        "|<u, A v> - <A u, v>| is",
        defects[:, j],
        scale.expand(_WIDTH),
        trial.bound(rtol),
        [
            trial.unit_line(2 * _WIDTH),
            f"u, v = V[:, {{i}}], V[:, {_WIDTH + j}]",
            "print(abs(complex(torch.vdot(u, A @ v) - torch.vdot(A @ u, v))))",
        ],
    )


def assert_positive_semidefinite(
    A: Any, *, rtol: float | None = None, seed: int = 0, **how: Any
) -> None:
    """No eigenvalue below ``-rtol ‖A‖``: of the matrix up to n = 256, as Lanczos sees it beyond.

    A negative one is proved: by the Rayleigh quotient of its vector, from a product of its own.
    Costs n products, or up to a few hundred.
    """
    trial = Trial.of(A, seed, how)
    op = trial.op
    if op.size <= _DENSE:
        norm, x, how_found = *_lowest_of_matrix(trial), _FROM_MATRIX
    else:
        norm, x, how_found = *_lowest_by_lanczos(trial), _FROM_LANCZOS.format(seed=seed)
    quotient = float(torch.vdot(x, op.matvec(x)).real / torch.vdot(x, x).real)
    if not quotient >= -trial.bound(rtol) * norm:
        trial.fail(
            f"expected no negative eigenvalue, got x^T A x = {quotient:.6g} for a unit vector x, "
            f"where |A| is about {norm:.6g} and rtol={trial.bound(rtol):.1e} is allowed",
            [how_found, "print(float(torch.vdot(x, A @ x).real))"],
        )


_FROM_MATRIX = "D = A.to_dense(); x = torch.linalg.eigh((D + D.mH) / 2).eigenvectors[:, 0]"
_FROM_LANCZOS = (
    'from torchlinop import lanczos; r = lanczos(A, 2, which="BE", seed={seed}, tol=1e-3); '
    "x = r.eigenvectors[:, r.eigenvalues.argmin()]"
)


def _lowest_of_matrix(trial: Trial) -> tuple[float, Tensor]:
    """‖A‖ and the eigenvector of the smallest eigenvalue."""
    D = trial.op.to_dense()
    bad = ~torch.isfinite(D)
    if bad.any():
        trial.fail(
            f"{int(bad.sum())} entries of the matrix are NaN or infinite, the first at "
            f"{tuple(bad.nonzero()[0].tolist())}",
            ["print(int((~A.to_dense().isfinite()).sum()))"],
        )
    eigenvalues, X = torch.linalg.eigh((D + D.mH) / 2)
    return float(eigenvalues.abs().max()), X[:, 0]


def _lowest_by_lanczos(trial: Trial) -> tuple[float, Tensor]:
    with warnings.catch_warnings():
        # An eigenvalue next to zero need not be known relative to itself.
        warnings.simplefilter("ignore", NotConvergedWarning)
        ends = lanczos(trial.op, 2, which="BE", seed=trial.seed, tol=1e-3)
    x = ends.eigenvectors[:, ends.eigenvalues.argmin()].to(trial.op.dtype)
    return float(ends.eigenvalues.abs().max()), x / torch.linalg.vector_norm(x)


def _columns(op: CurvatureOperator, V: Tensor) -> Tensor:
    return torch.stack([op.matvec(v) for v in V.unbind(1)], dim=1)


def _inner(X: Tensor, Y: Tensor) -> Tensor:
    """``Xᴴ Y`` (k, m), in double precision."""
    wide = torch.complex128 if X.is_complex() else torch.float64
    return X.mH.to(wide) @ Y.to(wide)
