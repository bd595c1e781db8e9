"""Hypothesis strategies: spectra, operators, models with data, ragged batches, memory layouts.

What shrinks are sizes, kinds and scales; entries are random numbers of a drawn seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from numpy.typing import NDArray
from torch import Tensor, nn

from torchlinop.adapters.scipy import as_linear_operator, from_linear_operator
from torchlinop.operators.base import CurvatureOperator
from torchlinop.operators.explicit import LambdaOperator, MatrixOperator
from torchlinop.testing import spectra as prescribed
from torchlinop.testing.gallery import with_spectrum
from torchlinop.testing.model_problem import Problem, in_batches, supervised
from torchlinop.testing.rotated import RotatedOperator

_DTYPES = (torch.float32, torch.float64)
_SEEDS = st.integers(0, 2**32 - 1)


def dtypes() -> SearchStrategy[torch.dtype]:
    """float32 or float64."""
    return st.sampled_from(_DTYPES)


@st.composite
def spectra(
    draw: DrawFn,
    *,
    min_size: int = 1,
    max_size: int = 24,
    exponents: tuple[int, int] = (-30, 30),
    positive: bool = False,
) -> Tensor:
    """Eigenvalues (n,) in float64, descending, times a power of two of these exponents.

    Gaussian, decaying, of low rank, multiple, constant or mirrored ones; of either sign unless
    ``positive`` (then no less than 0).
    """
    n = draw(st.integers(min_size, max_size))
    kind = draw(st.sampled_from([*_KINDS] if positive else [*_KINDS, "gaussian", "mirrored"]))
    generator = torch.Generator().manual_seed(draw(_SEEDS))
    eigenvalues = {**_KINDS, **_INDEFINITE}[kind](n, generator)
    scaled = 2.0 ** draw(st.integers(*exponents)) * eigenvalues
    return scaled.sort(descending=True).values


def _gaussian(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, generator=generator, dtype=torch.float64)


_KINDS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "constant": lambda n, _: torch.ones(n, dtype=torch.float64),
    "decaying": lambda n, _: prescribed.exponential(n, 0.5),
    "low rank": lambda n, _: prescribed.low_rank(n, max(1, n // 3)),
    "multiple": lambda n, g: _gaussian(n, g).abs()[torch.arange(n) // 3],
    "zero": lambda n, _: torch.zeros(n, dtype=torch.float64),
}
_INDEFINITE: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "gaussian": _gaussian,
    "mirrored": lambda n, _: prescribed.indefinite(n),
}


@st.composite
def operators(
    draw: DrawFn,
    *,
    eigenvalues: SearchStrategy[Tensor] | None = None,
    dtype: SearchStrategy[torch.dtype] | None = None,
) -> CurvatureOperator:
    """Right symmetric operators of these spectra: matrices, functions, rotations, sums, adapters.

    Their dtypes are float32 and float64 unless given.
    """
    values = draw(spectra() if eigenvalues is None else eigenvalues)
    values = values.to(draw(dtypes() if dtype is None else dtype))
    form = draw(st.sampled_from(list(_FORMS.values())))
    return form(values, draw(_SEEDS))


def _matrix(values: Tensor, seed: int) -> Tensor:
    return with_spectrum(values.double(), seed)[0].to(values.dtype)


def _function(values: Tensor, seed: int) -> CurvatureOperator:
    A = _matrix(values, seed)
    return LambdaOperator(len(A), lambda v: A @ v, dtype=A.dtype)


def _through_scipy(values: Tensor, seed: int) -> CurvatureOperator:
    A = as_linear_operator(MatrixOperator(_matrix(values, seed)))
    return from_linear_operator(1.0 * A)  # a product of SciPy's own, no longer the adapter


def _sum(values: Tensor, seed: int) -> CurvatureOperator:
    part = RotatedOperator(values, seed=seed)
    return 0.25 * part + 0.75 * part


_FORMS: dict[str, Callable[[Tensor, int], CurvatureOperator]] = {
    "matrix": lambda values, seed: MatrixOperator(_matrix(values, seed)),
    "function": _function,
    "rotated": lambda values, seed: RotatedOperator(values, seed=seed),
    "sum": _sum,
    "through SciPy": _through_scipy,
}


@st.composite
def vectors(
    draw: DrawFn, n: int, *, columns: int | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Gaussian vectors (n,), or blocks (n, columns), in any memory layout."""
    generator = torch.Generator().manual_seed(draw(_SEEDS))
    shape = (n,) if columns is None else (n, columns)
    return draw(layouts(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)))


def layouts(X: Tensor) -> SearchStrategy[Tensor]:
    """X itself and equal tensors: transposed in memory, with strides, with an offset."""
    return st.sampled_from(list(_LAYOUTS.values())).map(lambda lay_out: lay_out(X))


def _strided(X: Tensor) -> Tensor:
    wide = X.new_full(tuple(2 * size for size in X.shape), torch.nan)
    view = wide[tuple(slice(None, None, 2) for _ in X.shape)]
    return view.copy_(X)


def _offset(X: Tensor) -> Tensor:
    memory = X.new_full((X.numel() + 1,), torch.nan)
    return memory[1:].view(X.shape).copy_(X)


_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "transposed": lambda X: X.mT.contiguous().mT if X.ndim > 1 else X.clone(),
    "strided": _strided,
    "offset": _offset,
}


def array_layouts(X: NDArray[Any]) -> SearchStrategy[NDArray[Any]]:
    """X and equal arrays: Fortran order, negative strides, read-only, the other byte order."""
    return st.sampled_from(list(_ARRAY_LAYOUTS.values())).map(lambda lay_out: lay_out(X))


def _read_only(X: NDArray[Any]) -> NDArray[Any]:
    copy = X.copy()
    copy.flags.writeable = False
    return copy


_ARRAY_LAYOUTS: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "contiguous": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
    "reversed": lambda X: X[::-1].copy()[::-1],
    "strided": lambda X: np.repeat(X, 2, axis=0)[::2],
    "read-only": _read_only,
    "byte-swapped": lambda X: X.astype(X.dtype.newbyteorder()),
}


@st.composite
def models(
    draw: DrawFn, inputs: int, outputs: int, *, dtype: torch.dtype = torch.float64
) -> nn.Sequential:
    """Networks of one to three linear layers with smooth activations, with biases or without."""
    widths = [inputs, *draw(st.lists(st.integers(1, 4), max_size=2)), outputs]
    activation = draw(st.sampled_from([nn.Tanh, nn.Sigmoid, nn.GELU, nn.Softplus]))
    bias = draw(st.booleans())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(_SEEDS))
        layers: list[nn.Module] = []
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            layers += [activation()] if i else []
            layers.append(nn.Linear(fan_in, fan_out, bias=bias))
    return nn.Sequential(*layers).to(dtype)


@st.composite
def batches(draw: DrawFn, full: Any) -> list[Any]:
    """A tuple or dict of tensors (N, ...) cut into one to four batches of any sizes."""
    N = len(next(iter(full.values())) if isinstance(full, dict) else full[0])
    cuts = sorted(draw(st.sets(st.integers(1, N - 1), max_size=3))) if N > 1 else []
    sizes = [stop - start for start, stop in zip([0, *cuts], [*cuts, N], strict=True)]
    return in_batches(full, *sizes)


@st.composite
def model_problems(draw: DrawFn, *, dtype: torch.dtype = torch.float64) -> Problem:
    """A model, ragged batches and a loss: squared errors, cross-entropy or binary cross-entropy.

    Mean-reduced, with at most 8 samples of 3 features and 60 parameters.
    """
    N, outputs = draw(st.integers(1, 8)), draw(st.integers(2, 3))
    generator = torch.Generator().manual_seed(draw(_SEEDS))
    X = torch.randn(N, 3, generator=generator, dtype=torch.float64).to(dtype)
    real = torch.randn(N, outputs, generator=generator, dtype=torch.float64).to(dtype)
    criterion, targets = draw(
        st.sampled_from(
            [
                (nn.MSELoss(), real),
                (nn.CrossEntropyLoss(), real.argmax(1)),
                (nn.BCEWithLogitsLoss(), (real > 0).to(dtype)),
            ]
        )
    )
    full = (X, targets)
    sizes = [len(batch[0]) for batch in draw(batches(full))]
    return supervised(draw(models(3, outputs, dtype=dtype)), full, tuple(sizes), criterion)
