"""The matrices of the solver benchmarks, whose eigenvalues are known, and products that count."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
from pretend_device import Device, pretended
from torch import Tensor

from torchlinop import CurvatureOperator, HessianOperator
from torchlinop.demo import digits_mlp
from torchlinop.space import VectorSpace
from torchlinop.testing import spectra
from torchlinop.testing.gallery import Problem, with_spectrum
from torchlinop.testing.oracles import dense_hessian

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Matrix:
    """``V ↦ A V`` for blocks (n, k) in float64 on the CPU, and all eigenvalues of A."""

    title: str
    product: Callable[[Tensor], Tensor] = field(repr=False)
    eigenvalues: Tensor = field(repr=False)  # (n,)
    network: Problem | None = None  # if it is a Hessian

    @property
    def size(self) -> int:
        return len(self.eigenvalues)

    @property
    def norm(self) -> float:
        return float(self.eigenvalues.abs().max())

    def largest(self, k: int, which: str) -> Tensor:
        """The k eigenvalues wanted, descending, copies counted."""
        keys = self.eigenvalues.abs() if which == "LM" else self.eigenvalues
        return self.eigenvalues[keys.argsort(descending=True)[:k]].sort(descending=True).values


class Counted:
    """The products of one run: columns, calls, and when each began and ended."""

    def __init__(self, matrix: Matrix, device: Device | None = None) -> None:
        self.matrix = matrix
        self.size, self.dtype = matrix.size, matrix.eigenvalues.dtype
        self.device = pretended() if device else _CPU
        self.shape = (self.size, self.size)
        self.columns = 0
        self.spans: list[tuple[float, float]] = []
        self.usages: list[Any] = []  # of the device, where each product began
        self._device = device

    @property
    def calls(self) -> int:
        return len(self.spans)

    def block(self, V: Tensor) -> Tensor:
        """A V (n, k)."""
        began = time.perf_counter()
        self.columns += V.shape[1]
        if self._device:
            self.usages.append(self._device.usage)
            AV = self._device.product(self.matrix.product, V)
        else:
            AV = self.matrix.product(V)
        self.spans.append((began, time.perf_counter()))
        return AV

    def vector(self, v: Tensor) -> Tensor:
        """A v (n,)."""
        return self.block(v[:, None])[:, 0]

    def __matmul__(self, V: Tensor) -> Tensor:
        """As curvlinops multiplies."""
        return self.vector(V) if V.ndim == 1 else self.block(V)

    def ours(self) -> CurvatureOperator:
        """As this library multiplies."""
        return _Ours(self)

    def scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """As SciPy multiplies."""
        return scipy.sparse.linalg.LinearOperator(
            self.shape,
            matvec=lambda v: self.vector(torch.from_numpy(v.reshape(-1))).numpy(),
            matmat=lambda V: self.block(torch.from_numpy(V)).numpy(),
            dtype=np.float64,
        )


class _Ours(CurvatureOperator):
    def __init__(self, counted: Counted) -> None:
        super().__init__(VectorSpace(counted.size, counted.dtype, counted.device))
        self._counted = counted

    def _matmat(self, V: Tensor) -> Tensor:
        return self._counted.block(V)


def reflected(title: str, eigenvalues: Tensor) -> Matrix:
    """``H₁ H₂ Λ H₂ H₁`` with two random reflections, whose products cost O(n).

    Krylov methods with Gaussian starts see the eigenvalues alone. Estimators with other probes
    need eigenvectors without preferred axes: see `haar`.
    """
    generator = torch.Generator().manual_seed(0)
    U = torch.randn(len(eigenvalues), 2, generator=generator, dtype=torch.float64)
    U /= U.norm(dim=0)

    def product(V: Tensor) -> Tensor:
        W = V.clone(memory_format=torch.contiguous_format)
        for u in (U[:, :1], U[:, 1:]):
            W.addmm_(u, u.mT @ W, alpha=-2)
        W.mul_(eigenvalues[:, None])
        for u in (U[:, 1:], U[:, :1]):
            W.addmm_(u, u.mT @ W, alpha=-2)
        return W

    return Matrix(title, product, eigenvalues)


def haar(title: str, eigenvalues: Tensor) -> Matrix:
    """A dense matrix with random eigenvectors."""
    A, _ = with_spectrum(eigenvalues)
    return Matrix(title, lambda V: A @ V, eigenvalues)


def of_digits() -> Matrix:
    """The Hessian of a small MLP that was trained on scikit-learn's digits, n = 1,810."""
    problem = digits_mlp()
    H = HessianOperator(problem.model, [problem.full_batch], problem.loss_fn)
    dense = dense_hessian(problem.full_loss, problem.parameters, rows_at_once=64)
    return Matrix("Hessian, digits", H.matmat, torch.linalg.eigvalsh(dense), problem)


def diagonal(n: int, dtype: torch.dtype = torch.float32) -> Matrix:
    """A matrix whose products are as good as free."""
    eigenvalues = spectra.polynomial(n, -0.5).to(dtype)
    return Matrix("diagonal", lambda V: V * eigenvalues[:, None], eigenvalues)


def eigenvalue_problems(n: int) -> dict[str, Callable[[], Matrix]]:
    """By name; each is built when it is its turn."""
    top = torch.tensor([10] * 4 + [9.99] * 3 + [9, 8.999, 8.998], dtype=torch.float64)
    of = {
        "poly": lambda: spectra.polynomial(n),
        "slow": lambda: spectra.polynomial(n, -0.5),
        "cluster": lambda: torch.cat([top, torch.linspace(0, 1, n - 10, dtype=torch.float64)]),
        "nn": lambda: spectra.neural(n),
        "nnhard": lambda: _crowded(n),
    }
    prescribed = {
        name: lambda name=name, build=build: reflected(name, build()) for name, build in of.items()
    }
    return {**prescribed, "digits": of_digits}


def _crowded(n: int) -> Tensor:
    """As of a network's Hessian, with outliers that run into the bulk: 10 to 0.55."""
    eigenvalues = spectra.neural(n)
    eigenvalues[:10] = 10 * 0.055 ** (torch.arange(10, dtype=torch.float64) / 9)
    return eigenvalues


def trace_problems(n: int) -> dict[str, Matrix]:
    of = {
        "poly": spectra.polynomial(n),
        "exp": spectra.exponential(n),
        "flat": spectra.flat(n),
        "nn": spectra.neural(n),
    }
    return {name: haar(name, eigenvalues) for name, eigenvalues in of.items()}
