"""``torchlinop demo``: the main job on a model trained on digits, without any file."""

from __future__ import annotations

import argparse

from torchlinop.command_line.options import Subparsers, command
from torchlinop.errors import OptionError


def add(subparsers: Subparsers) -> None:
    """The arguments of this command."""
    parser = command(
        subparsers,
        "demo",
        "ten eigenvalues of the Hessian of a network trained on digits",
        "Trains it in a second, without downloads, and prints SciPy's answer beside the dense one.",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from torchlinop.demo import main  # noqa: PLC0415  # takes a second, of no use elsewhere

    try:
        main()
    except ModuleNotFoundError as error:
        raise OptionError(f"{error}") from error
    print(
        "\nYour own model: torchlinop doctor my_model.py:build (torchlinop eigs --help tells how)"
    )
    return 0
