"""``torchlinop trace SPEC``: the trace, with a standard error."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from torchlinop.algorithms.trace import trace
from torchlinop.algorithms.trace_method import Method
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
        "trace",
        "the trace with its standard error",
        "By random vectors. Exit code 1: stopped early, or --rtol was not reached.",
    )
    add_spec(parser)
    group = parser.add_argument_group("trace")
    group.add_argument(
        "--max-matvecs", type=int, metavar="N", help="most products (60; 1000 for --rtol)"
    )
    group.add_argument(
        "--rtol", type=float, help="end when twice the standard error is this part of the estimate"
    )
    group.add_argument("--method", choices=get_args(Method), default="auto", help="(auto)")
    add_max_seconds(group)
    add_outputs(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    def estimate(operator: CurvatureOperator, state: Path | None) -> Outcome:
        result = trace(
            operator,
            options.max_matvecs,
            rtol=options.rtol,
            method=options.method,
            seed=options.seed,
            max_seconds=options.max_seconds,
            progress=True,
        )
        return Outcome(result, result.converged, unfinished=False)

    return run(options, estimate)
