"""``torchlinop compare SPEC``: eigensolvers on one matrix."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torchlinop.command_line.curvature import operator_for, parts_of
from torchlinop.command_line.files import refuse_existing, refuse_unwritable
from torchlinop.command_line.loading import built
from torchlinop.command_line.options import Subparsers, add_json, add_spec, command
from torchlinop.command_line.report import note, print_json
from torchlinop.errors import OptionError

_ENDS = ("LA", "SA", "LM")


def add(subparsers: Subparsers) -> None:
    """The arguments of this command."""
    parser = command(
        subparsers,
        "compare",
        "eigensolvers on one matrix, and what is true of their answers",
        "build() may also return a dict of operators by name, and the module register solvers of "
        "its\nown, by torchlinop.compare.eigensolver.",
    )
    add_spec(parser)
    group = parser.add_argument_group("comparison")
    group.add_argument("-k", type=int, default=10, help="how many pairs (10)")
    group.add_argument("--which", choices=_ENDS, default="LA", help="the end (LA)")
    group.add_argument("--tol", type=float, help="relative residual (1e-6; 1e-4 in float32)")
    group.add_argument("--budget", type=int, help="most products of a run (100 k)")
    group.add_argument("--seconds", type=float, default=60.0, help="most of a run (60)")
    group.add_argument("--seeds", type=int, default=3, help="how many (3)")
    group.add_argument(
        "--solver", action="append", help='a name or pattern, as "scipy*"; again for more (all)'
    )
    group.add_argument("--truth", choices=["dense"], help="compute all eigenvalues, for errors")
    group.add_argument("--no-histories", action="store_true", help="no curves in --html and --out")
    output = parser.add_argument_group("output")
    output.add_argument("--html", type=Path, help="write a page with pictures")
    output.add_argument("--out", metavar="FILE.json", type=Path, help="write all numbers")
    output.add_argument("--overwrite", action="store_true", help="replace files that exist")
    add_json(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    for path in (options.html, options.out):
        refuse_existing(path, options.overwrite)
        refuse_unwritable(path)
    if options.html is not None and options.html == options.out:
        raise OptionError(f"--html and --out are both {options.out}; give two names")
    from torchlinop.compare import compare  # noqa: PLC0415  # takes a second, of no use elsewhere

    found = compare(
        _problems(built(options.spec, options.seed), options),
        options.k,
        options.which,
        options.solver,
        tol=options.tol,
        budget=options.budget,
        seconds=options.seconds,
        seeds=options.seeds,
        truth=options.truth,
        histories=bool(options.html or options.out) and not options.no_histories,
        progress=True,
    )
    if options.out:
        found.save(options.out)
    if options.html:
        note(f"page: {found.to_html(options.html)}")
    if options.json:
        print_json(found.to_dict())
    else:
        print(found, flush=True)
    return int(found.interrupted)


def _problems(made: Any, options: argparse.Namespace) -> Any:
    """The matrix that the options ask for, or whatever ``compare`` takes, as it is."""
    chosen = (options.operator, options.params, options.device, options.dtype)
    if parts_of(made) is None and not any(chosen):
        return made
    return operator_for(made, options)
