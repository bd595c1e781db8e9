"""Eigenvalues that several quadratures found sharply: where they are, and what they weigh."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Atoms:
    """Points of a spectral measure, ascending.

    The mass of an eigenvalue is its multiplicity over n: ``size * mass ± size * stderr`` counts.
    """

    values: Tensor  # (k,)
    masses: Tensor  # (k,) means over the probes
    stderr: Tensor  # (k,) of the masses, by their law for probes on a sphere
    size: int  # n

    @property
    def counts(self) -> Tensor:
        """Estimated multiplicities, (k,)."""
        return self.size * self.masses

    def select(self, mask: Tensor) -> Atoms:
        return Atoms(self.values[mask], self.masses[mask], self.stderr[mask], self.size)

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Ritz:
    """The Ritz values of all probes in one row, (N,)."""

    probe: Tensor  # which probe, from 0
    nodes: Tensor
    weights: Tensor
    errors: Tensor  # of the nodes as eigenvalues, by `location_errors`
    probes: int  # how many there are

    def atoms(self, tolerance: float, size: int) -> tuple[Atoms, Tensor]:
        """Values known to ``tolerance`` that half of the probes agree on, and the mask of the rest.

        Values within the tolerance of each other count as one: copies that Lanczos makes of a
        converged value, the same eigenvalue seen by several probes, eigenvalues that close.
        """
        sharp = (self.errors <= tolerance).nonzero()[:, 0]
        sharp = sharp[self.nodes[sharp].argsort()]
        theta = self.nodes[sharp]
        label = torch.zeros(len(sharp), dtype=torch.int64)
        label[1:] = (theta.diff() > tolerance).cumsum(0)
        masses = torch.zeros(self.probes, int(label.max()) + 1 if len(label) else 0).double()
        seen = masses.clone()
        centres = masses.clone()
        cells = (self.probe[sharp], label)
        masses.index_put_(cells, self.weights[sharp], accumulate=True)
        seen.index_put_(cells, torch.ones_like(theta))
        centres.index_put_(cells, self.weights[sharp] * theta, accumulate=True)
        agreed = 2 * seen.sum(0) >= self.probes
        rest = torch.ones(len(self.nodes), dtype=torch.bool)
        rest[sharp[agreed[label]]] = False
        values = centres.sum(0) / masses.sum(0)
        atoms = Atoms(values, masses.mean(0), self._spread(masses.mean(0), size), size)
        return atoms.select(agreed), rest

    def _spread(self, masses: Tensor, size: int) -> Tensor:
        """Standard errors from the law of the masses: Beta(c / 2, (n − c) / 2) for a count c ≥ 1.

        A sample of few probes is too skewed to tell: most are small, and a few are large.
        """
        p = masses.clamp_min(1 / size)
        return (2 * p * (1 - p) / ((size + 2) * self.probes)).sqrt()


def location_errors(nodes: Tensor, residuals: Tensor, tolerance: float) -> Tensor:
    """How far the Ritz values (m,) of one probe may be from an eigenvalue: ``min(r, r² / gap)``.

    The gap is the distance to the nearest other value, beyond ``tolerance`` (Parlett 1980,
    §11.7). Copies have large residuals while Lanczos makes them, but small errors.
    """
    distances = (nodes[:, None] - nodes).abs()
    gaps = distances.where(distances > tolerance, torch.inf).amin(1)
    return torch.minimum(residuals, residuals**2 / gaps)


def standard_error(samples: Tensor) -> Tensor:
    """Of the mean over independent probes, the first axis; infinite for a single one."""
    if len(samples) == 1:
        return torch.full_like(samples[0], torch.inf)
    p = len(samples)
    squares: Tensor = (samples - samples.mean(0)).square().sum(0)
    return (squares / (p * (p - 1))).sqrt()
