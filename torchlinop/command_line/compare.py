"""``python -m torchlinop compare MODULE:build``: eigensolvers on what build() returns."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from torchlinop.command_line.loading import built
from torchlinop.compare import compare
from torchlinop.compare.request import End
from torchlinop.errors import OptionError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add(subparsers: Subparsers) -> None:
    """The arguments of this command."""
    parser = subparsers.add_parser(
        "compare",
        help="compare eigensolvers on one operator",
        description=__doc__,
        epilog="build() returns an operator, an array, or a dict of these by name. The module may "
        "register solvers of its own, by torchlinop.compare.eigensolver.",
    )
    parser.add_argument("build", metavar="MODULE:build", help="a function, or dir/file.py:build")
    parser.add_argument("-k", type=int, default=10, help="how many pairs (10)")
    parser.add_argument("--which", choices=get_args(End), default="LA", help="the end (LA)")
    parser.add_argument("--tol", type=float, help="relative residual (1e-6; 1e-4 in float32)")
    parser.add_argument("--budget", type=int, help="products a run (100 k)")
    parser.add_argument("--seconds", type=float, default=60.0, help="a run (60)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (3)")
    parser.add_argument(
        "--solver", action="append", help='a name or pattern, as "scipy*"; again for more (all)'
    )
    parser.add_argument("--truth", choices=["dense"], help="compute all eigenvalues, for errors")
    parser.add_argument("--no-histories", action="store_true", help="fewer runs, and no curves")
    parser.add_argument("--html", type=Path, help="write a page with pictures")
    parser.add_argument("--json", type=Path, help="write all numbers")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    for path in (options.html, options.json):
        _refuse_path(path)
    problems: Any = built(options.build)
    found = compare(
        problems,
        options.k,
        options.which,
        options.solver,
        tol=options.tol,
        budget=options.budget,
        seconds=options.seconds,
        seeds=options.seeds,
        truth=options.truth,
        histories=not options.no_histories,
        progress=True,
    )
    print(found)
    if options.json:
        found.save(options.json)
    if options.html:
        print(f"\npage: {found.to_html(options.html)}")
    return 0


def _refuse_path(path: Path | None) -> None:
    if path is not None and not path.absolute().parent.is_dir():
        raise OptionError(f"no folder {path.parent} to write {path.name} into; make it first")
    if path is not None and path.is_dir():
        raise OptionError(f"{path} is a folder; give the name of a file")
