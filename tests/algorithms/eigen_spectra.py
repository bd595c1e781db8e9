"""Spectra with known ends, on which eigensolvers are judged, and what they have to satisfy."""

import torch

from torchlinop.testing.gallery import with_spectrum

F64 = torch.float64


def _bulk(m):
    """The quantiles of a semicircle of radius 1/2."""
    x = torch.linspace(-0.5, 0.5, 20_001, dtype=F64)
    mass = (0.25 - x**2).clamp_min(0).sqrt().cumsum(0)
    return x[torch.searchsorted(mass / mass[-1], (torch.arange(m, dtype=F64) + 0.5) / m)]


def spectrum(name, n=1000):
    """Eigenvalues (n,), descending."""
    i = torch.arange(1, n + 1, dtype=F64)
    top = torch.tensor([10] * 4 + [9.99] * 3 + [9, 8.999, 8.998], dtype=F64)
    below = torch.linspace(-1.5, -0.7, 5, dtype=F64)
    spectra = {
        "poly": i**-2,
        "slow": i**-0.5,
        "cluster": torch.cat([top, torch.linspace(0, 1, n - 10, dtype=F64)]),
        "nn": torch.cat([torch.linspace(10, 2, 10, dtype=F64), below, _bulk(n - 15)]),
        "nnhard": torch.cat([10 * 0.055 ** ((i[:10] - 1) / 9), below, _bulk(n - 15)]),
        "zero": 0 * i,
        "identity": i**0,
        "rank 1": 10 * (i == 1).double(),
        "rank 5": (6 - i).clamp_min(0),
        "1 and 50": 1 + 49 * (i <= 3).double(),
        "4-fold": torch.cat([top[:4], _bulk(n - 4)]),
        "mirrored": torch.cat([torch.tensor([10, 5, -5, -10], dtype=F64), _bulk(n - 4)]),
        "condition 1e16": 10 ** (-16 * (i - 1) / (n - 1)),
    }
    return spectra[name].sort(descending=True).values


def matrix(eigenvalues, dtype=F64):
    return with_spectrum(eigenvalues)[0].to(dtype)


def assert_honest(result, A, wanted):
    """Residuals as large as claimed, orthonormal vectors, and eigenvalues where claimed."""
    eps = torch.finfo(result.eigenvectors.dtype).eps
    values, X = result.eigenvalues.double(), result.eigenvectors.double()
    rounding = 10 * eps * float(torch.linalg.matrix_norm(A.double(), 2))
    true = (A.double() @ X - X * values).norm(dim=0)
    assert (true <= 1.1 * result.residual_norms + rounding).all()
    assert result.orthogonality_loss <= 100 * eps
    claims = result.converged
    bounds = 2 * result.error_bounds + rounding
    assert ((values - wanted).abs() <= bounds)[claims].all()
