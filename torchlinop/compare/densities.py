"""Spectral densities at equal products: Wasserstein distances to the true spectrum."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from torchlinop.algorithms.spectral_density import SpectralDensity
from torchlinop.compare.comparison import Comparison
from torchlinop.compare.history import History
from torchlinop.compare.registry import Candidate, Wanted, density_estimator
from torchlinop.compare.request import DensityRequest
from torchlinop.compare.rows import COSTS, Column, Row, points_of, small
from torchlinop.compare.runs import Run, common, run_of
from torchlinop.compare.subject import Subject, Truth, subjects_of
from torchlinop.compare.sweep import Measures, facts_of, seeds_of, sweep
from torchlinop.errors import NonFiniteError, OptionError, VectorError


@dataclass(frozen=True)
class DensityAnswer:
    """A quadrature, and, if there is one, its density on a grid."""

    nodes: Tensor
    weights: Tensor  # positive, of any sum
    grid: Tensor | None = None
    density: Tensor | None = None


@dataclass(frozen=True)
class DensityRow(Row):
    """A density estimator on a matrix: medians of the seeds, over the range of the spectrum."""

    quadrature: float = math.nan  # of nodes and weights
    density: float = math.nan  # of the density on its grid

    @property
    def accuracy(self) -> float:
        return self.quadrature

    @property
    def reached(self) -> bool:
        return True

    @classmethod
    def columns(cls) -> list[Column]:
        return [
            *COSTS,
            Column(
                "quadrature",
                lambda r: small(r.quadrature),
                "distance of nodes and weights to the spectrum (Wasserstein-1, over its range)",
            ),
            Column("density", lambda r: small(r.density), "likewise of the density on its grid"),
        ]


def compare_densities(
    problems: Any,
    probes: int = 10,
    steps: int = 40,
    estimators: Iterable[Wanted] | None = None,
    *,
    seconds: float = 60.0,
    seeds: int | Sequence[int] = 3,
    truth: Truth | Mapping[str, Truth] = None,
    histories: bool = True,
    progress: bool = False,
) -> Comparison:
    """The density of eigenvalues from probes × steps products, by every estimator.

    Distances need all eigenvalues (see `compare` for ``truth``). An estimator is a function
    ``(operator, request) -> (nodes, weights)`` or DensityAnswer, registered by
    ``@density_estimator("name")``. Costs ``seeds`` times the products, and as much again for the
    histories. Errors: those of `compare`.
    """
    if probes < 1 or steps < 2:
        raise OptionError(
            f"expected one probe and two steps or more, got {probes} and {steps}; leave them out"
        )
    subjects, numbers = subjects_of(problems, truth), seeds_of(seeds)

    def row(subject: Subject, candidate: Candidate, steps: int) -> DensityRow:
        requests = [DensityRequest(probes, min(steps, subject.operator.size), s) for s in numbers]
        budget = probes * requests[0].steps
        runs = [
            run_of(subject, candidate, r, answer_of, budget=budget, seconds=seconds)
            for r in requests
        ]
        return _row(subject, candidate.name, runs)

    def measured(subject: Subject, candidate: Candidate) -> tuple[DensityRow, History | None]:
        whole = row(subject, candidate, steps)
        if not histories or not subject.whole or whole.failures:
            return whole, None
        fewer = sorted({steps // 8, steps // 4, steps // 2} - {0, 1})
        rows = [*(row(subject, candidate, m) for m in fewer), whole]
        return whole, History.of(subject.name, candidate, points_of(rows))

    measures = Measures(measured, DensityRow)
    done = sweep(subjects, density_estimator, estimators, measures, progress=progress)
    facts = facts_of(subjects, f"{probes} probes of {steps} steps", numbers)
    return done.comparison(
        "of spectral densities", "distance of the quadrature / range", facts, NOTES
    )


def answer_of(found: Any) -> DensityAnswer:
    """What an estimator returned, as points and weights.

    Raises:
        VectorError: of different lengths; NonFiniteError: NaN among them.
    """
    if isinstance(found, SpectralDensity):
        there = torch.isfinite(found.raw_eigenvalues)
        found = DensityAnswer(
            found.raw_eigenvalues[there], found.raw_weights[there], found.grid, found.density
        )
    if not isinstance(found, DensityAnswer):
        found = DensityAnswer(*found)
    nodes, weights = (
        torch.as_tensor(t).double().cpu().flatten() for t in (found.nodes, found.weights)
    )
    if nodes.shape != weights.shape or not len(nodes):
        raise VectorError(
            f"expected a weight for every node, got {len(weights)} and {len(nodes)}; return "
            "(nodes, weights)"
        )
    if not bool(torch.isfinite(nodes).all() and torch.isfinite(weights).all()):
        raise NonFiniteError(
            "NaN or infinity in the nodes or weights; look for it in the estimator"
        )
    if not bool((weights >= 0).all() and weights.sum() > 0):
        raise VectorError("expected weights of at least 0, and not all 0; return (nodes, weights)")
    if found.grid is None or found.density is None:
        return DensityAnswer(nodes, weights)
    grid, density = (torch.as_tensor(t).double().cpu() for t in (found.grid, found.density))
    if grid.ndim != 1 or grid.shape != density.shape or not bool((density > 0).any()):
        raise VectorError(
            f"expected a positive density at every point of a grid, got {tuple(density.shape)} and "
            f"{tuple(grid.shape)}; leave both out, or return (m,) and (m,)"
        )
    return DensityAnswer(nodes, weights, grid, density)


def _row(subject: Subject, name: str, runs: Sequence[Run[DensityAnswer]]) -> DensityRow:
    found = [run.answer for run in runs if run.answer]
    exact = subject.eigenvalues
    if exact is None or not subject.whole or not found:
        return DensityRow(subject.name, name, **common(runs))
    span = float(exact.max() - exact.min()) or 1.0
    smooth = [
        distance(a.grid, a.density, exact) / span
        for a in found
        if a.grid is not None and a.density is not None
    ]
    return DensityRow(
        subject.name,
        name,
        **common(runs),
        quadrature=statistics.median(distance(a.nodes, a.weights, exact) for a in found) / span,
        density=statistics.median(smooth) if smooth else math.nan,
    )


def distance(points: Tensor, weights: Tensor, exact: Tensor) -> float:
    """The Wasserstein-1 distance: the integral of the difference of distribution functions."""
    positive = weights.double().cpu().clamp_min(0)
    return float(
        wasserstein_distance(points.double().cpu().numpy(), exact.numpy(), positive.numpy())
    )


NOTES = (
    "All take the same number of probes and steps, counted by the matrix. Distances are medians of "
    "the seeds.",
    "A point of a history is as many runs with fewer steps.",
)
