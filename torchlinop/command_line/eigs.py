"""``torchlinop eigs SPEC``: eigenvalues at an end of the spectrum."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from torchlinop.algorithms.krylov_schur import Which
from torchlinop.algorithms.lanczos import lanczos
from torchlinop.command_line.options import (
    Subparsers,
    add_max_seconds,
    add_outputs,
    add_spec,
    command,
)
from torchlinop.command_line.run import Outcome, run
from torchlinop.operators.base import CurvatureOperator

_GOES_ON = ("maxmatvecs", "maxseconds", "interrupted")  # of the statuses


def add(subparsers: Subparsers) -> None:
    """The arguments of this command."""
    parser = command(
        subparsers,
        "eigs",
        "eigenvalues and eigenvectors at an end of the spectrum",
        "By thick-restart Lanczos, with a residual for every pair. Exit code 1: not all converged.",
    )
    add_spec(parser)
    group = parser.add_argument_group("eigenpairs")
    group.add_argument("-k", type=int, default=10, help="how many pairs (10)")
    group.add_argument(
        "--which",
        choices=get_args(Which),
        default="LM",
        help="largest in size, largest, smallest, or both ends (LM)",
    )
    group.add_argument("--tol", type=float, help="relative residual (1e-6; 1e-4 in float32)")
    group.add_argument("--ncv", type=int, help="vectors to keep (2k + 1, and 20 at least)")
    group.add_argument("--max-matvecs", type=int, metavar="N", help="most products (50 ncv)")
    add_max_seconds(group)
    add_outputs(parser, checkpoint=True)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    def eigenpairs(operator: CurvatureOperator, state: Path | None) -> Outcome:
        result = lanczos(
            operator,
            options.k,
            options.max_matvecs,
            which=options.which,
            tol=options.tol,
            ncv=options.ncv,
            seed=options.seed,
            max_seconds=options.max_seconds,
            checkpoint=state,
            progress=True,
        )
        converged = len(result) == options.k and bool(result.converged.all())
        return Outcome(result, converged, result.status in _GOES_ON)

    return run(options, eigenpairs)
