"""``module:build`` or ``file.py:build``, on the command line, as what the function returns."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from torchlinop.errors import OptionError
from torchlinop.from_model import refuse_bad_seed
from torchlinop.random_state import reseed

_ELSEWHERE = "run where it can be imported, or give the path of a file, dir/file.py:build"


def built(spec: str, seed: int) -> Any:
    """Import the module, from the current folder too, and call ``build()``.

    All random numbers are seeded before, so that a spec that sets no seed of its own is the same
    model every time. What it prints goes to stderr.

    Raises:
        OptionError: the spec has another form, or there is no such module, or function, or it
            raises.
    """
    refuse_bad_seed("seed", seed)
    where, colon, name = spec.rpartition(":")
    if not (colon and where and name):
        raise OptionError(
            f"expected MODULE:FUNCTION or FILE.py:FUNCTION, got {spec!r}; write my_model.py:build, "
            "where build() returns (model, data, loss)"
        )
    reseed(seed, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with contextlib.redirect_stdout(sys.stderr):
        module = _module(where)
        build = getattr(module, name, None)
        if not callable(build):
            raise OptionError(
                f"expected a function {name!r} in {where}, which has "
                f"{', '.join(_functions(module)[:10]) or 'none'}; name one that returns "
                "(model, data, loss)"
            )
        return _called(spec, build)


def _called(spec: str, build: Any) -> Any:
    try:
        return build()
    except (Exception, SystemExit) as error:
        raise OptionError(
            f"{spec} raised {type(error).__name__}: {error}; pass --verbose to see where"
        ) from error


def _functions(module: ModuleType) -> list[str]:
    """Names of what the module defines itself."""
    return [n for n, f in vars(module).items() if getattr(f, "__module__", "") == module.__name__]


def _module(where: str) -> ModuleType:
    try:
        if where.endswith(".py"):
            return _of_file(Path(where))
        if "" not in sys.path:
            sys.path.insert(0, "")
        return importlib.import_module(where)
    except (Exception, SystemExit) as error:
        absent = isinstance(error, ModuleNotFoundError) and where.startswith(error.name or where)
        raise OptionError(
            f"could not import {where!r}: {type(error).__name__}: {error}; "
            + (_ELSEWHERE if absent else "pass --verbose to see where")
        ) from error


def _of_file(path: Path) -> ModuleType:
    # A file may be called as a module that is in use: random.py, say.
    name = path.stem if path.stem not in sys.modules else f"spec_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ModuleNotFoundError(f"no file {path}")
    sys.path.insert(0, str(path.absolute().parent))  # as Python does for a script
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
