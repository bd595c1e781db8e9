"""Rows of eigensolvers: costs of all seeds, accuracy of the worst, claims held to the truth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torchlinop.compare.judge import Judged
from torchlinop.compare.memory import Usage
from torchlinop.compare.rows import CLAIMED_RESIDUAL, COSTS, Column, Row, small
from torchlinop.compare.runs import Run, common
from torchlinop.compare.spread import UNKNOWN, Spread


@dataclass(frozen=True)
class EigenRow(Row):
    """An eigensolver on a matrix."""

    k: int = 0
    pairs: int = 0  # the fewest of a seed
    converged: int = 0  # of these, true residuals below tol |θ|; the fewest of a seed
    residual: float = math.nan  # the largest ‖A x − θ x‖ / |θ| of all seeds
    residuals: Spread = UNKNOWN  # the largest of every seed
    error: float = math.nan  # the largest |θ_i − λ_i| / |λ_i|
    orthogonality: float = math.nan  # max |XᴴX − I|
    tolerated: float = math.inf  # of it
    ghosts: int = 0
    missed: int | None = None
    claimed_residual: float = math.nan
    claimed: int | None = None  # pairs called converged, the most of a seed
    makes_claims: bool = False
    peak_bytes: int | None = None
    peak_vectors: float = math.nan
    host_reads: int | None = None

    @classmethod
    def of(
        cls,
        problem: str,
        solver: str,
        runs: Sequence[Run[Judged]],
        *,
        k: int,
        tolerated: float,
        usage: Usage | None,
        vector: int,
    ) -> EigenRow:
        """The row of these runs; a vector takes so many bytes."""
        judged = [run.answer for run in runs if run.answer]
        return cls(
            problem,
            solver,
            **common(runs),
            false=max((j.false for j in judged), key=len, default=()),
            false_seeds=sum(bool(j.false) for j in judged),
            k=k,
            pairs=min((j.pairs for j in judged), default=0),
            converged=min((j.converged for j in judged), default=0),
            residual=_worst(j.residual for j in judged),
            residuals=Spread.of(j.residual for j in judged),
            error=_worst(j.error for j in judged),
            orthogonality=_worst(j.orthogonality for j in judged),
            tolerated=tolerated,
            ghosts=max((j.ghosts for j in judged), default=0),
            missed=max((j.missed for j in judged if j.missed is not None), default=None),
            claimed_residual=_worst(j.claimed_residual for j in judged),
            claimed=max((j.claimed for j in judged if j.claimed is not None), default=None),
            makes_claims=any(j.makes_claims for j in judged),
            peak_bytes=usage.peak_bytes if usage else None,
            peak_vectors=usage.peak_bytes / vector if usage else math.nan,
            host_reads=usage.host_reads if usage else None,
        )

    @property
    def accuracy(self) -> float:
        return self.residual

    @property
    def reached(self) -> bool:
        return self.converged == self.k

    @property
    def flaw(self) -> str:
        """Residuals do not tell of copies, of angles, nor of eigenvalues that were missed."""
        if not self.reached:
            return ""
        copies = self.ghosts and not self.false  # a claim that says so, if there is one
        said = [f"{self.ghosts} of {self.pairs} pairs are copies of others"] * bool(copies)
        skew = not self.ghosts and self.orthogonality > self.tolerated
        said += [f"vectors are not orthogonal: max |XᵀX − I| is {self.orthogonality:.0e}"] * skew
        said += [f"{self.missed} of the eigenvalues wanted are missing"] * bool(self.missed)
        return "; ".join(said)

    @classmethod
    def columns(cls) -> list[Column]:
        return [
            *COSTS,
            Column(
                "vectors",
                lambda r: "-" if math.isnan(r.peak_vectors) else f"{r.peak_vectors:.0f}",
                "of n numbers, held at most, beside the matrix",
            ),
            Column(
                "host reads",
                lambda r: "-" if r.host_reads is None else str(r.host_reads),
                "how often the host waits for a CUDA device, outside of products",
                detail=True,
            ),
            Column("residual", lambda r: small(r.residual), "the largest ‖A x − θ x‖ / |θ|"),
            CLAIMED_RESIDUAL,
            Column(
                "error",
                lambda r: small(r.error),
                "the largest |θ_i − λ_i| / |λ_i| of the i-th value and eigenvalue, copies counted",
            ),
            Column("orth.", lambda r: small(r.orthogonality), "max |XᵀX − I|", detail=True),
            Column(
                "converged",
                lambda r: f"{r.converged}/{r.k}" if r.pairs else "-",
                "pairs with true residuals below tol |θ|, of the seed with the fewest",
            ),
            Column(
                "called so",
                lambda r: "-" if r.claimed is None else str(r.claimed),
                "pairs that the solver calls converged",
                detail=True,
            ),
            Column(
                "ghosts",
                lambda r: str(r.ghosts) if r.pairs else "-",
                "pairs that are copies of others",
            ),
            Column(
                "missed",
                lambda r: "-" if r.missed is None else str(r.missed),
                "eigenvalues wanted, copies counted, that no value is near to",
            ),
        ]


def _worst(values: Iterable[float]) -> float:
    return max((v for v in values if not math.isnan(v)), default=math.nan)
