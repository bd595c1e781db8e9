"""Operators whose eigenvalues are all known, by name: what a comparison takes its truth from."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchlinop.choices import refuse_unknown
from torchlinop.errors import OptionError
from torchlinop.operators.base import CurvatureOperator
from torchlinop.operators.explicit import MatrixOperator
from torchlinop.operators.gauss_newton import GGNOperator
from torchlinop.operators.hessian import HessianOperator
from torchlinop.testing import spectra
from torchlinop.testing.digits import digits, digits_mlp, digits_softmax
from torchlinop.testing.gallery import with_spectrum
from torchlinop.testing.model_problem import of_inputs
from torchlinop.testing.oracles import dense_hessian
from torchlinop.testing.rotated import RotatedOperator

# (eigenvalues (n,), seed of the eigenvectors) -> the operator
Rotation = Callable[[Tensor, int], CurvatureOperator]


@dataclass(frozen=True)
class EigenProblem:
    """A symmetric operator, and the answer."""

    name: str
    operator: CurvatureOperator
    eigenvalues: Tensor = field(repr=False)  # (n,), float64 on the CPU, descending

    @property
    def norm(self) -> float:
        """‖A‖, the largest |λ|."""
        return float(self.eigenvalues.abs().max())

    def wanted(self, k: int, which: str = "LA") -> Tensor:
        """The k eigenvalues (k,) at the LA, SA or LM end, the most wanted first, copies counted."""
        return spectra.wanted(self.eigenvalues, which, k)


def problems() -> dict[str, str]:
    """The names that `problem` knows, each with what is particular about it."""
    return {**{name: doc for name, (doc, _) in _SPECTRA.items()}, **_OF_DIGITS_SAY}


def problem(
    name: str,
    n: int | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    rotation: Rotation | None = None,
    seed: int = 0,
) -> EigenProblem:
    """The problem of this name, with n rows (1,000 unless given) where its spectrum has any n.

    Eigenvectors are those of `RotatedOperator`, so that n can be a million; ``rotation=haar``
    gives a dense matrix with Haar-distributed ones. Problems of digits have a size and
    eigenvectors of their own; "digits network" takes dense eigenvalues of its Hessian, in a few
    seconds.

    Raises:
        OptionError: unknown name, or n for a problem of digits or too small for the spectrum;
            ModuleNotFoundError: scikit-learn, for the digits, is missing.
    """
    if name in _OF_DIGITS:
        if n is not None or rotation is not None:
            raise OptionError(
                f"{name!r} has its own rows and eigenvectors, got n={n}; leave n and rotation out"
            )
        return _OF_DIGITS[name](dtype)
    refuse_unknown("problem", name, problems())
    n = 1000 if n is None else n
    if n < _LEAST:
        raise OptionError(f"expected n of at least {_LEAST}, where spectra have room; got {n}")
    eigenvalues = _SPECTRA[name][1](n).to(dtype).sort(descending=True).values
    operator = (rotation or _hartley)(eigenvalues, seed)
    return EigenProblem(name, operator, eigenvalues.double().cpu())


def haar(eigenvalues: Tensor, seed: int = 0) -> CurvatureOperator:
    """The dense matrix of these eigenvalues (n,), with eigenvectors that have no preferred axes."""
    return MatrixOperator(with_spectrum(eigenvalues.double(), seed)[0].to(eigenvalues.dtype))


def _hartley(eigenvalues: Tensor, seed: int) -> CurvatureOperator:
    return RotatedOperator(eigenvalues, seed=seed)


_LEAST = 20

_SPECTRA: dict[str, tuple[str, Callable[[int], Tensor]]] = {
    "flat": ("from 3 to 1: nothing stands out", spectra.flat),
    "polynomial": ("i^-2: decays fast, then slowly", spectra.polynomial),
    "slow": ("i^-1/2: no gap anywhere", lambda n: spectra.polynomial(n, -0.5)),
    "exponential": ("0.9^i: of low rank in effect", spectra.exponential),
    "step": ("ones, for a twentieth, and 1e-8", lambda n: spectra.step(n, n // 20)),
    "neural": ("as of a network: outliers, a bulk around zero, few negative", spectra.neural),
    "clustered": ("10 four times, 9.99 thrice, three within 2e-3, a bulk", spectra.clustered),
    "multiple": ("five eigenvalues, each four times, above a bulk", spectra.multiple),
    "indefinite": ("as many negative as positive, in pairs ±λ", spectra.indefinite),
    "tiny": ("neural times 1e-12: absolute thresholds take it for 0", lambda n: _scaled(n, 1e-12)),
    "huge": ("neural times 1e12", lambda n: _scaled(n, 1e12)),
    "low rank": ("5, 4, 3, 2, 1, then 0: invariant subspaces", spectra.low_rank),
    "1 and 50": ("50 thrice, then 1: invariant in two steps", spectra.two_values),
}


def _scaled(n: int, factor: float) -> Tensor:
    return factor * spectra.neural(n)


def _digits_softmax(dtype: torch.dtype) -> EigenProblem:
    p = digits_softmax(dtype)
    G = GGNOperator(p.model, p.batches, of_inputs, p.criterion)
    X, _ = digits()
    moments = torch.linalg.eigvalsh(X.T @ X / len(X))
    known = torch.cat([(moments / 10).repeat_interleave(9), torch.zeros(64, dtype=torch.float64)])
    return EigenProblem("digits softmax", G, known.sort(descending=True).values)


def _digits_network(dtype: torch.dtype) -> EigenProblem:
    p = digits_mlp()
    batches = [(X.to(dtype), y) for X, y in p.batches]
    H = HessianOperator(p.model.to(dtype), batches, p.loss_fn)
    return EigenProblem("digits network", H, _eigenvalues_of_network().clone())


@functools.cache
def _eigenvalues_of_network() -> Tensor:
    p = digits_mlp()
    H = dense_hessian(p.full_loss, p.parameters, rows_at_once=64)
    eigenvalues: Tensor = torch.linalg.eigvalsh(H).flip(0)
    return eigenvalues


_OF_DIGITS: dict[str, Callable[[torch.dtype], EigenProblem]] = {
    "digits softmax": _digits_softmax,
    "digits network": _digits_network,
}
_OF_DIGITS_SAY = {
    "digits softmax": "GGN of softmax regression at 0, n = 640: each eigenvalue nine times",
    "digits network": "Hessian of a trained MLP, n = 1,810, indefinite",
}
