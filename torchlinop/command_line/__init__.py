"""``python -m torchlinop COMMAND``: one module a command, each adding its own arguments."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from torchlinop.command_line import compare
from torchlinop.errors import TorchlinopError

_COMMANDS = (compare,)  # each has ``add(subparsers)``, which sets ``run``


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit code: 2, with one sentence, for input that is no use."""
    parser = argparse.ArgumentParser(prog="python -m torchlinop", description=__doc__)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add(subparsers)
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
    except TorchlinopError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code
