"""``torchlinop density SPEC``: how all eigenvalues are distributed."""

from __future__ import annotations

import argparse
from pathlib import Path

from torchlinop.algorithms.spectral_density import spectral_density
from torchlinop.command_line.options import (
    Subparsers,
    add_max_seconds,
    add_outputs,
    add_spec,
    command,
)
from torchlinop.command_line.run import Outcome, run
from torchlinop.operators.base import CurvatureOperator


def add(subparsers: Subparsers) -> None:
    """The arguments of this command."""
    parser = command(
        subparsers,
        "density",
        "the density of all eigenvalues, and the outliers",
        "By stochastic Lanczos quadrature. Exit code 1: stopped early.",
    )
    add_spec(parser)
    group = parser.add_argument_group("density")
    group.add_argument("--probes", type=int, default=10, metavar="N", help="random vectors (10)")
    group.add_argument("--steps", type=int, default=80, metavar="N", help="products of each (80)")
    group.add_argument(
        "--points", type=int, default=10_000, metavar="N", help="of the grid (10000)"
    )
    add_max_seconds(group)
    add_outputs(parser, checkpoint=True)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    def density(operator: CurvatureOperator, state: Path | None) -> Outcome:
        result = spectral_density(
            operator,
            options.probes,
            options.steps,
            options.points,
            seed=options.seed,
            max_seconds=options.max_seconds,
            checkpoint=state,
            progress=True,
        )
        return Outcome(result, not result.warnings, unfinished=bool(result.warnings))

    return run(options, density)
