"""What a command prints: results on stdout; warnings, logs and errors on stderr."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torchlinop.algorithms.result import Result
from torchlinop.errors import NotConvergedWarning, TorchlinopWarning


def print_result(result: Result, options: argparse.Namespace, **facts: Any) -> None:
    """The result as it describes itself; with --json one object, which has ``facts`` too."""
    if options.json:
        print_json({**facts, **result.to_dict()})
    else:
        print(result, flush=True)


def print_json(content: Mapping[str, Any]) -> None:
    """One object; what JSON has no number for is null."""
    print(json.dumps(_plain(content), ensure_ascii=False, allow_nan=False), flush=True)


def note(sentence: str) -> None:
    """A sentence on stderr."""
    print(" ".join(sentence.split()), file=sys.stderr, flush=True)


def print_error(error: Exception, *, verbose: bool, kind: str = "") -> None:
    """One sentence on stderr; where it arose, if that is asked for."""
    if verbose:
        traceback.print_exception(error)
    advice = "; pass --verbose to see where" if kind and not verbose else ""
    note(f"error: {kind}{error}{advice}")


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


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
