"""``module:build`` or ``file.py:build``, on the command line, as what the function returns."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torchlinop.errors import OptionError


def built(spec: str) -> Any:
    """Import the module, from the current folder too, and call ``build()``.

    Raises:
        OptionError: the spec has another form, or there is no such module, or function, or it
            raises.
    """
    where, colon, name = spec.rpartition(":")
    if not (colon and where and name):
        raise OptionError(
            f"expected MODULE:FUNCTION, got {spec!r}; write my_module:build, where build() returns "
            "an operator"
        )
    module = _module(where)
    build = getattr(module, name, None)
    if not callable(build):
        own = [
            n for n, f in vars(module).items() if getattr(f, "__module__", "") == module.__name__
        ]
        raise OptionError(
            f"expected a function {name!r} in {where}, which has "
            f"{', '.join(own[:10]) or 'none'}; name one that returns an operator"
        )
    try:
        return build()
    except Exception as error:
        raise OptionError(
            f"{spec} raised {type(error).__name__}: {error}; call it in Python to see where"
        ) from error


def _module(where: str) -> ModuleType:
    try:
        if where.endswith(".py"):
            return _of_file(Path(where))
        if "" not in sys.path:
            sys.path.insert(0, "")
        return importlib.import_module(where)
    except Exception as error:
        raise OptionError(
            f"could not import {where!r}: {type(error).__name__}: {error}; run where it can be "
            "imported, or give the path of a file, dir/file.py:build"
        ) from error


def _of_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
