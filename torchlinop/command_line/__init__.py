"""``torchlinop COMMAND``: one module a command, each adding its own arguments."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

import torchlinop
from torchlinop.command_line import compare, demo, density, doctor, eigs, show, trace
from torchlinop.command_line.report import forget_stdout, note, print_error, told_on_stderr
from torchlinop.command_line.run import BAD_INPUT, NOT_CONVERGED

_COMMANDS = (demo, doctor, eigs, trace, density, compare, show)  # each has ``add(subparsers)``
_DETAIL = """\
Curvature matrices of your own model: start with  torchlinop doctor SPEC

exit codes: 0 done; 1 not converged, stopped, or the doctor found a fault; 2 bad input"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit code: 2, with one sentence, for input that is no use."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(words)
    options.command = shlex.join(["torchlinop", *words])
    with told_on_stderr(verbose=options.verbose):
        try:
            code: int = options.run(options)
        except KeyboardInterrupt:
            note("stopped before there was a result")
            return NOT_CONVERGED
        except BrokenPipeError:
            forget_stdout()
            return NOT_CONVERGED
        except Exception as error:
            print_error(error, verbose=options.verbose)
            return BAD_INPUT
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchlinop", epilog=_DETAIL, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=torchlinop.__version__)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for command in _COMMANDS:
        command.add(subparsers)
    return parser
