"""Nodes and weights of ``vᵀ f(A) v ≈ Σ_j w_j f(θ_j)`` for random v: stochastic Lanczos quadrature.

Without a basis. Products are spent here; `Quadrature` answers what is asked of them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from torchlinop.algorithms.checkpoint import Checkpoint
from torchlinop.algorithms.early_stop import announced
from torchlinop.algorithms.estimates import refuse_probability
from torchlinop.algorithms.given_operator import refuse_no_operator
from torchlinop.algorithms.probes import Probes, checked_seed
from torchlinop.algorithms.products import Products
from torchlinop.algorithms.quadrature_result import Quadrature, SpectralSum
from torchlinop.algorithms.sizes import refuse_fractions, refuse_non_numbers
from torchlinop.algorithms.symmetric_run import symmetric_run
from torchlinop.algorithms.three_term import Stage, ThreeTermRecurrence, tridiagonals
from torchlinop.choices import refuse_unknown_options
from torchlinop.errors import NonFiniteError, OptionError
from torchlinop.operators.base import CurvatureOperator

_STREAM = 4  # of random numbers: other estimators with the same seed draw other probes
_SAVES = 4  # of the state of a group of probes, in the course of its steps


class LongRun(TypedDict, total=False):
    """What a quadrature of many products may be given besides, as `slq` explains."""

    probes_at_once: int | None
    max_seconds: float
    progress: bool
    checkpoint: str | Path | None


def slq(
    op: CurvatureOperator,
    num_probes: int = 10,
    num_steps: int = 80,
    *,
    seed: int = 0,
    probes_at_once: int | None = None,
    max_seconds: float = math.inf,
    progress: bool = False,
    checkpoint: str | Path | None = None,
) -> Quadrature:
    """Nodes and weights of stochastic Lanczos quadrature.

    Probes are uniform on the sphere, each drawn from a stream of its own that depends on the seed
    and its number. They advance together through ``num_steps`` blocks of products (never more
    than n, and fewer where their Krylov spaces are exhausted), ``probes_at_once`` of them if
    memory is short. Costs ``num_probes num_steps`` products and memory for three blocks
    (n, probes at once).

    Ctrl-C, or the end of ``max_seconds``, returns the probes that are complete, or else the steps
    taken, with a warning. ``checkpoint`` is a file that the state is written to
    then, and a few times on the way; where it exists, the run goes on from it, and ends as if it
    had never been interrupted, bit by bit. It must be that of the same operator, at the same
    parameters and on the same data. ``progress`` shows a bar, on a terminal.

    Raises:
        OptionError: fewer than one probe or step, or no such seed; the checkpoint is of another
            problem, or of another matrix.
        NonFiniteError, SymmetryError: the products are not those of a fixed symmetric matrix;
            MemoryEstimateError: memory ran out.

    Source: Golub and Meurant 2010, chapter 4; Ubaru, Chen and Saad, SIMAX 38 (2017).
    """
    return announced(
        quadrature_of(
            op,
            num_probes,
            num_steps,
            seed=seed,
            probes_at_once=probes_at_once,
            max_seconds=max_seconds,
            progress=progress,
            checkpoint=checkpoint,
        )
    )


def quadrature_of(
    op: CurvatureOperator,
    num_probes: int,
    num_steps: int,
    *,
    seed: int,
    probes_at_once: int | None = None,
    max_seconds: float = math.inf,
    progress: bool = False,
    checkpoint: str | Path | None = None,
) -> Quadrature:
    """``slq`` without a warning to the caller."""
    refuse_no_operator(op)
    seed = checked_seed(seed)
    at_once = num_probes if probes_at_once is None else probes_at_once
    refuse_fractions(num_probes=num_probes, num_steps=num_steps, probes_at_once=at_once)
    if min(num_probes, num_steps, at_once) < 1:
        raise OptionError(
            f"expected at least one probe and step, got {num_probes} probes, {at_once} at once, "
            f"and {num_steps} steps; leave them out for 10 and 80"
        )
    steps = min(num_steps, op.size)
    with symmetric_run(
        op, seed=seed, total=num_probes * steps, max_seconds=max_seconds, progress=progress
    ) as A:
        run = _Run(A, num_probes, steps, at_once, seed, checkpoint)
        return run.result(run.go())


class _Run:
    """Groups of probes, one after another, each through all steps."""

    def __init__(  # noqa: PLR0917  # what it is a run of
        self, A: Products, probes: int, steps: int, at_once: int, seed: int,
        path: str | Path | None,
    ) -> None:  # fmt: skip
        self.A, self.probes, self.steps, self.at_once, self.seed = A, probes, steps, at_once, seed
        self.complete: list[tuple[Tensor, Tensor]] = []  # α and β (steps, k) of whole groups
        self.group: ThreeTermRecurrence | None = None
        self.seconds_before = 0.0
        space = A.operator.space
        self.file = None if path is None else Checkpoint(path, self._fingerprint(), space)
        self._resume()

    def go(self) -> str:
        """Until all is done; the word for what ended it before, or none."""
        try:
            ended = self._all_groups()
        except KeyboardInterrupt:
            ended = "interrupted"
        if ended:
            self._save()
        return ended

    def _all_groups(self) -> str:
        fresh = True  # a run takes a step at least, however late it is
        while self.done < self.probes:
            group = self.group = self.group or self._next_group()
            while group.steps < self.steps and not group.exhausted:
                if self.A.late and not fresh:
                    return "out of time"
                group.advance()
                fresh = False
                if group.steps % max(1, self.steps // _SAVES) == 0 and group.steps < self.steps:
                    self._save()
            self.group = None
            self.complete.append(group.coefficients())
            self._save()
        return ""

    @property
    def done(self) -> int:
        """Probes that are complete."""
        return sum(alphas.shape[1] for alphas, _ in self.complete)

    def _next_group(self) -> ThreeTermRecurrence:
        probes = Probes(self.A.operator.space, "sphere", self.seed, _STREAM)
        V = probes.columns(self.done, min(self.done + self.at_once, self.probes))
        return ThreeTermRecurrence(self.A, V.div_(self.A.norms(V).to(V.dtype)))

    def result(self, ended: str) -> Quadrature:
        """Of the complete groups, or of the steps of the first."""
        A, groups = self.A, self.complete
        if not groups:
            if self.group is None or not self.group.steps:
                raise KeyboardInterrupt  # before the first product
            groups = [self.group.coefficients()]
        Ts = [T for group in groups for T in tridiagonals(group)]
        taken = self.steps if self.complete else Ts[0].taken  # of exhausted Krylov spaces: all
        warnings = (
            f"{ended} after {taken} of {self.steps} steps of {len(Ts)} of {self.probes} probes",
        )
        return Quadrature(
            _padded([T.nodes for T in Ts], self.steps),
            _padded([T.weights for T in Ts], self.steps),
            _padded([T.residuals for T in Ts], self.steps),
            A.operator.size,
            taken,
            A.matvecs,
            self.seed,
            A.operator.dtype,
            A.noise,
            self.seconds_before + A.seconds,
            warnings if ended else (),
        )

    def _fingerprint(self) -> dict[str, object]:
        """What must agree for the next step to be the same."""
        return {
            "algorithm": "slq",
            "operator": repr(self.A.operator),
            "num_probes": self.probes,
            "num_steps": self.steps,
            "probes_at_once": self.at_once,
            "seed": self.seed,
        }

    def _save(self) -> None:
        if self.file is None:
            return
        tensors: dict[str, Tensor] = {}
        for i, (alphas, betas) in enumerate(self.complete):
            tensors |= {f"alphas.{i}": alphas, f"betas.{i}": betas}
        if self.group is not None and self.group.steps:
            self.group.coefficients()  # refuses what is not finite
            tensors |= {f"group.{name}": t for name, t in self.group.stage.tensors().items()}
        self.file.save(tensors, {
            "groups": len(self.complete),
            "matvecs": self.A.matvecs,
            "matmats": self.A.matmats,
            "seconds": self.seconds_before + self.A.seconds,
        }, vectors={"group.V", "group.previous"} & tensors.keys())  # fmt: skip

    def _resume(self) -> None:
        state = None if self.file is None else self.file.load()
        if state is None:
            return
        tensors, numbers = state
        self.complete = [
            (tensors[f"alphas.{i}"], tensors[f"betas.{i}"]) for i in range(numbers["groups"])
        ]
        current = {
            name.removeprefix("group."): t
            for name, t in tensors.items()
            if name.startswith("group.")
        }
        if current:
            stage = Stage.of_tensors(current, self.A)
            self.group = ThreeTermRecurrence(self.A, stage)
        self.A.count(numbers["matvecs"], numbers["matmats"])
        self.seconds_before = numbers["seconds"]


def logdet(
    op: CurvatureOperator,
    *,
    damping: float = 0.0,
    num_probes: int = 10,
    num_steps: int = 80,
    seed: int = 0,
    **options: Unpack[LongRun],
) -> SpectralSum:
    """``log det(A + damping I)`` of a positive definite matrix, by `slq`.

    ``options`` are those of `slq`: probes_at_once, max_seconds, progress and checkpoint.

    Raises:
        NonFiniteError: the matrix is not positive definite, beyond rounding.
    """
    refuse_no_operator(op)
    refuse_unknown_options(options, LongRun.__optional_keys__)
    refuse_non_numbers(damping=damping)
    quadrature = slq(
        op.shift(damping) if damping else op, num_probes, num_steps, seed=seed, **options
    )
    low, high = quadrature.range
    if low <= quadrature.noise * max(-low, high):
        raise NonFiniteError(
            f"log det needs a positive definite matrix, but a Ritz value is {low:.3g} "
            f"(the largest: {high:.3g}); pass damping={max(-2 * low, 1e-3 * high):.1g}, say"
        )
    return quadrature.spectral_sum(torch.log)


def quadrature_size(distance: float, size: int, eta: float = 0.05) -> tuple[int, int]:
    """How many steps and probes bound the Wasserstein distance by ``distance`` times the range.

    With probability ``1 − eta``, for a matrix of ``size`` rows. Source: Chen, Trogdon and Ubaru,
    ICML 2021: ``m ≥ 12 / t + 1/2`` and ``p ≥ 4 ln(2n/η) / ((n + 2) t²)``.
    """
    refuse_probability("eta", eta, 0.05)
    if not 0 < distance < 1:
        raise OptionError(f"expected a distance between 0 and 1, got {distance}; pass 0.1, say")
    probes = 4 * math.log(2 * size / eta) / ((size + 2) * distance**2)
    return math.ceil(12 / distance + 0.5), math.ceil(probes)


def _padded(rows: list[Tensor], length: int) -> Tensor:
    padded = torch.full((len(rows), length), torch.nan, dtype=torch.float64)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded
