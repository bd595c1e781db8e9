"""The tests marked ``gpu`` of the checkout this package is in, in a process of their own."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import torchlinop
from torchlinop.bench.outcomes import VARIABLE

FOLDER = Path("tests", "gpu")

# What nothing but a device can show comes first, in case the time is not enough for all.
_ORDER = (
    "triton", "streams", "cupy", "cuda_graphs", "memory", "programs", "operators", "algorithms",
)  # fmt: skip


def checkout() -> Path | None:
    """The root of the checkout, or None where the package is installed by itself."""
    root = Path(torchlinop.__file__).parents[1]
    return root if (root / FOLDER).is_dir() else None


def missing() -> str:
    """Why the tests cannot run; nothing if they can."""
    if checkout() is None:
        return "skipped: no checkout with tests/gpu beside the installed package"
    if importlib.util.find_spec("pytest") is None:
        return "skipped: pytest is not installed"
    return ""


def command() -> list[str]:
    """To be run in the checkout.

    A warning is no failure here: the versions on a machine with a GPU are its own.
    """
    chosen = ["-m", "gpu", "-W", "default", "-p", "torchlinop.bench.outcomes", "-q", *_files()]
    return [sys.executable, "-m", "pytest", *chosen]


def _files() -> list[str]:
    def place(file: str) -> int:
        return next((i for i, word in enumerate(_ORDER) if word in file), len(_ORDER))

    files = sorted(str(file) for file in ((checkout() or Path()) / FOLDER).glob("test_*.py"))
    return sorted(files, key=place)


def environment(records: Path) -> dict[str, str]:
    """For the process of pytest. Plugins that happen to be installed are left out."""
    path = os.pathsep.join(filter(None, [str(checkout() or ""), os.environ.get("PYTHONPATH")]))
    without = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": path}
    return os.environ | {VARIABLE: str(records)} | without
