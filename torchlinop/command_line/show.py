"""``torchlinop show FILE``: a saved result, printed."""

from __future__ import annotations

import argparse
from pathlib import Path

from torchlinop.algorithms.result import load_result
from torchlinop.command_line.files import refuse_plot, write_plot
from torchlinop.command_line.options import Subparsers, add_json, command
from torchlinop.command_line.report import print_result


def add(subparsers: Subparsers) -> None:
    """The arguments of this command."""
    parser = command(
        subparsers, "show", "print a saved result", "FILE is what --out, or a result's save, wrote."
    )
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument("--plot", metavar="FILE.png", type=Path, help="draw it (matplotlib)")
    parser.add_argument("--overwrite", action="store_true", help="replace a picture that exists")
    add_json(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    refuse_plot(options.plot, overwrite=options.overwrite)
    result = load_result(options.file)
    print_result(result, options)
    if options.plot is not None:
        write_plot(options.plot, result)
    return 0
