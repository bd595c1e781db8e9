"""What a command prints: results on stdout; warnings, logs and errors on stderr."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

import torchlinop
from torchlinop.algorithms.result import Result
from torchlinop.errors import NotConvergedWarning, TorchlinopError, TorchlinopWarning
from torchlinop.json_value import json_value


def print_result(result: Result, options: argparse.Namespace, **facts: Any) -> None:
    """The result as it describes itself; with --json one object, which has ``facts`` too."""
    if options.json:
        print_json({**facts, **result.to_dict()})
    else:
        print(result, flush=True)


def print_json(content: Mapping[str, Any]) -> None:
    """One object; what JSON has no number for is null."""
    print(json.dumps(json_value(content), ensure_ascii=False, allow_nan=False), flush=True)


def note(sentence: str) -> None:
    """A sentence on stderr."""
    print(" ".join(sentence.split()), file=sys.stderr, flush=True)


def forget_stdout() -> None:
    """Whoever read it is gone, as ``head`` is: Python is not to write the rest at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_error(error: Exception, *, verbose: bool) -> None:
    """One sentence on stderr; all that led to it, if that is asked for."""
    if verbose:
        traceback.print_exception(error)
    if isinstance(error, TorchlinopError):
        note(f"error: {error}")
    else:  # of the user's model, mostly
        what = f"{type(error).__name__}: {error}"
        note(f"error: {what} ({place_of(error)}); pass --verbose to see all of it")


def place_of(error: BaseException) -> str:
    """The last line outside of torch and this package that led to the error."""
    frames = traceback.extract_tb(error.__traceback__)
    packages = (*torch.__path__, *torchlinop.__path__)
    own = [frame for frame in frames if not frame.filename.startswith((*packages, "<"))]
    place = (own or frames)[-1]
    return f"{os.path.basename(place.filename)}, line {place.lineno}"


@contextmanager
def told_on_stderr(*, verbose: bool) -> Iterator[None]:
    """Warnings and logs of this package in one line each."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        note(f"warning: {message}")

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("torchlinop")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", TorchlinopWarning)
            warnings.simplefilter("ignore", NotConvergedWarning)  # results say so themselves
            warnings.showwarning = show
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
