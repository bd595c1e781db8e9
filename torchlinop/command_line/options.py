"""Arguments that several commands share, said once."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TypeAlias

from torchlinop.command_line.curvature import KINDS

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

DTYPES = ("float64", "float32", "bfloat16", "float16")

_SPEC = """\
SPEC is MODULE:build or path/to/file.py:build, where build() takes no arguments and returns

  (model, data, loss)           loss: nn.CrossEntropyLoss(), F.mse_loss, another loss of torch or
                                of torchlinop.losses; or a function (model, batch) -> scalar
  (model, data)                 for a loss that fits the batches: cross-entropy for integer
                                targets or tokens, else the mean squared error
  {"model": ..., "data": ..., "loss": ..., "forward": ...}
                                forward(model, batch) -> outputs, with loss(outputs, batch);
                                other keys are options of the operator (weight, mode, method, ...)
  an operator                   of torchlinop or SciPy, or a symmetric array

data is a DataLoader, a list of batches, or one batch."""


def command(subparsers: Subparsers, name: str, says: str, detail: str) -> argparse.ArgumentParser:
    """The parser of a command."""
    parser = subparsers.add_parser(
        name,
        help=says,
        description=f"{says[0].upper()}{says[1:]}.\n\n{detail}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="log decisions, and show where errors arise"
    )
    return parser


def add_spec(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """What the matrix is made of, and which matrix it is."""
    parser.add_argument(
        "spec",
        metavar="SPEC",
        nargs="?" if optional else None,
        help="MODULE:build or file.py:build, see below",
    )
    parser.epilog = _SPEC
    group = parser.add_argument_group("matrix")
    group.add_argument("--operator", choices=KINDS, help="which matrix (hessian)")
    group.add_argument(
        "--params",
        metavar="GLOB",
        action="append",
        help='parameters to take, as "blocks.*.weight"; again for more (all)',
    )
    group.add_argument("--device", help="move model and data there, as cuda:0")
    group.add_argument("--dtype", choices=DTYPES, help="cast model and data")
    group.add_argument(
        "--seed", type=int, default=0, help="of build() and of all that is drawn here (0)"
    )


def add_max_seconds(parser: argparse._ActionsContainer) -> None:
    """When to end with what there is."""
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=math.inf,
        metavar="S",
        help="end after this time, with what there is",
    )


def add_json(parser: argparse._ActionsContainer) -> None:
    """How to print."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_outputs(parser: argparse.ArgumentParser, *, checkpoint: bool = False) -> None:
    """Where the answer goes."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out", metavar="FILE.safetensors", type=Path, help="save the result, see show"
    )
    group.add_argument("--plot", metavar="FILE.png", type=Path, help="draw it (matplotlib)")
    add_json(group)
    either = group.add_mutually_exclusive_group()
    either.add_argument("--overwrite", action="store_true", help="replace files that exist")
    if checkpoint:
        either.add_argument(
            "--resume",
            action="store_true",
            help="go on from where a run with this --out was stopped, if it was",
        )
        group.add_argument(
            "--no-checkpoint",
            action="store_true",
            help="do not save the state of the run beside --out",
        )
