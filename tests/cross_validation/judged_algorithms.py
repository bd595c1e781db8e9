"""Every algorithm on matrices with a prescribed spectrum, against SciPy's dense answer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.stats
import torch
from numpy.typing import NDArray

import torchlinop as tl
from torchlinop.testing.gallery import with_spectrum

Array = NDArray[np.float64]
N = 40
DTYPES = {"float64": torch.float64, "float32": torch.float32}

# ‖A‖ = 10; the condition number is 20. The second has as many eigenvalues below zero.
SPECTRA = {
    "definite": np.concatenate([[10, 8, 6, 4], np.linspace(2, 0.5, N - 4)]),
    "indefinite": np.concatenate(
        [[10, 8, 6, 4], np.linspace(2, 0.5, 16), np.linspace(-0.5, -2, 17), [-3, -5, -7]]
    ),
}

# Relative to ‖A‖: residuals are at most √u, errors of eigenvalues its square, and rounding.
EIGENVALUES = {"float64": 1e-9, "float32": 1e-5}
# Of vectors: the residual, √u, over the gaps (one) or times the condition number.
VECTORS = {"float64": 4e-7, "float32": 8e-3}
SOLVED = {"float64": 20 * 1e-12, "float32": 20 * 1e-5}  # the residual times the condition number
EXACT = {"float64": 1e-12, "float32": 1e-5}
DEVIATIONS = {"float64": 4.0, "float32": 4.0}  # standard errors of the estimate


@dataclass(frozen=True)
class Question:
    """What an algorithm is asked, what SciPy answers, and the distance of the two."""

    ours: Callable[[tl.MatrixOperator, torch.Tensor], object]
    scipy: Callable[[Array, Array], object]
    tolerance: dict[str, float]
    distance: Callable[[object, object], float]
    spectra: tuple[str, ...] = ("definite", "indefinite")


def relative(ours: object, theirs: object) -> float:
    theirs = np.asarray(theirs)
    found = ours.double().numpy() if isinstance(ours, torch.Tensor) else np.asarray(ours)
    assert found.shape == theirs.shape
    return float(np.abs(found - theirs).max() / np.abs(theirs).max())


def subspace(ours: object, theirs: object) -> float:
    """‖P − P̂‖ of the projections on the spans of eigenvectors (n, k)."""
    X = torch.as_tensor(ours).double().numpy()
    return float(np.abs(X @ X.T - theirs @ theirs.T).max())


def deviations(ours: object, theirs: object) -> float:
    """How many standard errors the estimate is off, at most."""
    estimate, stderr = (np.asarray(part, dtype=float) for part in ours)
    return float((np.abs(estimate - theirs) / stderr).max())


def eigenvalues(
    algorithm: Callable[..., tl.EigenResult], end: str = "LM", k: int = 3, **options: object
) -> Question:
    if end != "LM":  # the default, or the only one
        options["which"] = end
    if algorithm is not tl.power_iteration_one:
        options["k"] = k
    return Question(
        lambda op, b: algorithm(op, **options).eigenvalues.sort().values,
        lambda A, b: np.sort(wanted(scipy.linalg.eigvalsh(A), end, k)),
        EIGENVALUES,
        relative,
    )


def eigenvectors(
    algorithm: Callable[..., tl.EigenResult], which: str, **options: object
) -> Question:
    def largest(A: Array, b: Array) -> Array:
        values, X = scipy.linalg.eigh(A)
        return X[:, np.isin(values, wanted(values, which, 3))]

    return Question(
        lambda op, b: algorithm(op, 3, which=which, **options).eigenvectors,
        largest,
        VECTORS,
        subspace,
    )


def wanted(values: Array, which: str, k: int) -> Array:
    key = {"LM": -np.abs(values), "LA": -values, "SA": values, "SM": np.abs(values)}[which]
    return values[np.argsort(key)[:k]]


def solved(
    ours: Callable[..., object], shift: float = 0.0, spectra: tuple[str, ...] = ("definite",)
) -> Question:
    return Question(
        ours,
        lambda A, b: scipy.linalg.solve(A + shift * np.eye(N), b),
        SOLVED,
        relative,
        spectra,
    )


def applied(
    f: Callable[[torch.Tensor], torch.Tensor],
    scipy_s: Callable[[Array], Array],
    spectra: tuple[str, ...] = ("definite", "indefinite"),
) -> Question:
    return Question(
        lambda op, b: tl.apply_function(op, f, b).x,
        lambda A, b: scipy_s(A) @ b,
        VECTORS,
        relative,
        spectra,
    )


def estimated(
    ours: Callable[[tl.MatrixOperator], object],
    scipy_s: Callable[[Array], object],
    spectra: tuple[str, ...] = ("definite", "indefinite"),
) -> Question:
    def with_error(op: tl.MatrixOperator, b: torch.Tensor) -> object:
        result = ours(op)
        return result.estimate, result.stderr

    return Question(with_error, lambda A, b: scipy_s(A), DEVIATIONS, deviations, spectra)


def exact(
    ours: Callable[[tl.MatrixOperator], object],
    scipy_s: Callable[[Array], object],
    tolerance: dict[str, float] = EXACT,
    spectra: tuple[str, ...] = ("definite", "indefinite"),
) -> Question:
    return Question(lambda op, b: ours(op), lambda A, b: scipy_s(A), tolerance, relative, spectra)


def tight(op: tl.MatrixOperator) -> dict[str, float]:
    return {"rtol": 1e-12 if op.dtype == torch.float64 else 1e-5}


GRID = np.linspace(0, 10, 11)


def density(op: tl.MatrixOperator, b: torch.Tensor) -> object:
    return tl.slq(op, 30, N).density(torch.from_numpy(GRID), 1.0)


def smeared(A: Array, b: Array) -> Array:
    """The mean over the cell around each grid point, as documented."""
    edges = np.append(GRID - 0.5, GRID[-1] + 0.5)
    below = scipy.stats.norm.cdf(edges[:, None], scipy.linalg.eigvalsh(A), 1.0).mean(1)
    return np.diff(below)


def ritz_values(op: tl.MatrixOperator, b: torch.Tensor) -> torch.Tensor:
    return torch.linalg.eigvalsh(tl.lanczos_tridiagonal(op, b, N).matrix())


DEFINITE = ("definite",)
ALGORITHMS: dict[str, Question] = {
    **{f"lanczos, {end}": eigenvalues(tl.lanczos, end) for end in ("LM", "LA", "SA")},
    "lanczos, block of 3": eigenvalues(tl.lanczos, "LA", block_size=3),
    "lanczos, partial": eigenvalues(tl.lanczos, reorthogonalize="partial"),
    "lanczos, local": eigenvalues(tl.lanczos, k=1, reorthogonalize="local", max_iter=16),
    "lanczos, none": eigenvalues(tl.lanczos, k=1, reorthogonalize="none", max_iter=16),
    "lanczos, eigenvectors": eigenvectors(tl.lanczos, "LA"),
    "lanczos_tridiagonal, all Ritz values": Question(
        ritz_values, lambda A, b: scipy.linalg.eigvalsh(A), EIGENVALUES, relative
    ),
    "lobpcg, LA": eigenvalues(tl.lobpcg, "LA"),
    "lobpcg, SA": eigenvalues(tl.lobpcg, "SA"),
    "lobpcg, eigenvectors": eigenvectors(tl.lobpcg, "LA"),
    "power_iteration_one": eigenvalues(tl.power_iteration_one, k=1),
    "deflated_power_iteration": eigenvalues(tl.deflated_power_iteration, k=2),
    "randomized_eigh": eigenvalues(tl.randomized_eigh, oversampling=N - 3),
    "extremal_eigenvalues": exact(
        lambda op: tuple(tl.extremal_eigenvalues(op, N)),
        lambda A: scipy.linalg.eigvalsh(A)[[0, -1]],
        EIGENVALUES,
    ),
    "condition_number": exact(
        lambda op: tl.condition_number(op, N).estimate, np.linalg.cond, VECTORS, DEFINITE
    ),
    "norm, 2": exact(
        lambda op: float(tl.norm(op, 2, num_matvecs=N)), lambda A: scipy.linalg.norm(A, 2)
    ),
    "norm, fro": exact(
        lambda op: float(tl.norm(op, "fro", num_matvecs=N)), lambda A: scipy.linalg.norm(A, "fro")
    ),
    "norm, nuc": exact(
        lambda op: float(tl.norm(op, "nuc", num_matvecs=N)),
        lambda A: scipy.linalg.svdvals(A).sum(),
    ),
    "trace, n products": exact(lambda op: tl.trace(op, N).estimate, np.trace),
    **{
        f"trace, {method}": estimated(
            lambda op, method=method: tl.trace(op, 24, method=method), np.trace, spectra
        )
        for method, spectra in {
            "hutchinson": ("definite", "indefinite"),
            "hutch++": ("definite", "indefinite"),
            "na-hutch++": ("definite", "indefinite"),
            "xtrace": ("definite", "indefinite"),
            "xnystrace": DEFINITE,
        }.items()
    },
    "diagonal, xdiag": estimated(lambda op: tl.diagonal(op, 30), np.diagonal),
    "diagonal, hutchinson": estimated(
        lambda op: tl.diagonal(op, 30, method="hutchinson"), np.diagonal
    ),
    "slq, tr exp": estimated(
        lambda op: tl.slq(op, 30, N).spectral_sum(torch.exp),
        lambda A: np.trace(scipy.linalg.expm(A)),
    ),
    "spectral_density": Question(density, smeared, DEVIATIONS, deviations),
    "logdet": estimated(
        lambda op: tl.logdet(op, num_probes=30, num_steps=N),
        lambda A: np.linalg.slogdet(A)[1],
        DEFINITE,
    ),
    "solve": solved(lambda op, b: tl.solve(op, b, **tight(op)).x, spectra=tuple(SPECTRA)),
    "solve, damping": solved(lambda op, b: tl.solve(op, b, 0.5, **tight(op)).x, 0.5),
    "solve, preconditioned": solved(
        lambda op, b: (
            tl.solve(
                op, b, preconditioner=tl.DiagonalOperator(1 / op.matrix.diagonal()), **tight(op)
            ).x
        )
    ),
    "conjugate_gradient": solved(lambda op, b: tl.conjugate_gradient(op, b, **tight(op)).x),
    "minres": solved(lambda op, b: tl.minres(op, b, **tight(op)).x, spectra=tuple(SPECTRA)),
    "inverse": solved(lambda op, b: tl.inverse(op, 0.5, **tight(op)) @ b, 0.5),
    "apply_function, exp": applied(torch.exp, scipy.linalg.expm),
    "apply_function, sqrt": applied(torch.sqrt, scipy.linalg.sqrtm, DEFINITE),
    "apply_function, cos": applied(torch.cos, scipy.linalg.cosm),
}
CASES = [
    (name, spectrum, dtype)
    for name, question in ALGORITHMS.items()
    for spectrum in question.spectra
    for dtype in DTYPES
]


@functools.cache
def matrix(spectrum: str, dtype: str) -> torch.Tensor:
    """Of this spectrum, as it is when rounded to the dtype."""
    return with_spectrum(torch.from_numpy(SPECTRA[spectrum]))[0].to(DTYPES[dtype])


def error(name: str, spectrum: str, dtype: str) -> float:
    """The distance of our answer from SciPy's, which has the same rounded matrix in float64."""
    question, A = ALGORITHMS[name], matrix(spectrum, dtype)
    b = torch.randn(N, generator=torch.Generator().manual_seed(3), dtype=A.dtype)
    ours = question.ours(tl.MatrixOperator(A), b)
    return question.distance(ours, question.scipy(A.double().numpy(), b.double().numpy()))
