"""From options to a saved answer: files refused, matrix built, run, printed, written."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torchlinop.algorithms.result import Result
from torchlinop.command_line.curvature import operator_for
from torchlinop.command_line.files import Files
from torchlinop.command_line.interruption import interruptible
from torchlinop.command_line.loading import built
from torchlinop.command_line.report import note, print_result
from torchlinop.operators.base import CurvatureOperator

DONE, NOT_CONVERGED, BAD_INPUT = 0, 1, 2  # exit codes


@dataclass(frozen=True)
class Outcome:
    """A result, whether it is as accurate as was asked, and whether a longer run would go on."""

    result: Result
    converged: bool
    unfinished: bool


# (operator, file for the state of the run) -> what came out
Algorithm = Callable[[CurvatureOperator, Path | None], Outcome]


def run(options: argparse.Namespace, algorithm: Algorithm) -> int:
    """Run an algorithm on the matrix of the spec; the exit code.

    Raises:
        OptionError: bad input, found before the first product.
    """
    files = Files.of(options)
    operator = operator_for(built(options.spec, options.seed), options)
    if sys.stderr.isatty():
        note(repr(operator))
    with files.begun() as state, interruptible(operator) as heard:
        try:
            outcome = algorithm(heard, state)
        except KeyboardInterrupt:
            note(_stopped(state))
            return NOT_CONVERGED
    try:  # saved first: who reads what is printed may be gone
        files.write(outcome.result, finished=not outcome.unfinished)
    finally:
        print_result(outcome.result, options, operator=repr(operator))
    if outcome.unfinished and state is not None and state.exists():
        note(f"unfinished; to go on, with more products or time if need be: {_resuming(options)}")
    return DONE if outcome.converged else NOT_CONVERGED


def _stopped(state: Path | None) -> str:
    if state is not None and state.exists():
        return f"stopped; {state} has what was found, to go on from it pass --resume"
    return "stopped before there was anything to save"


def _resuming(options: argparse.Namespace) -> str:
    """The command once more."""
    command: str = options.command.replace(" --overwrite", "")
    return command if " --resume" in command else f"{command} --resume"
