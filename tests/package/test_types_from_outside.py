"""Type checkers that see only the installed package find its annotations, and a user's mistakes."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

USER = Path(__file__).with_name("user.py")


@pytest.fixture
def checked(tmp_path):
    """Runs a checker on a copy of the user's file, away from the settings of this project."""
    copy = shutil.copy(USER, tmp_path)

    def of(*command):
        done = subprocess.run(
            [*command, copy], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return of


def test_mypy_accepts_right_uses_and_no_wrong_ones(installed, checked):
    if find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    options = "--strict", "--allow-untyped-calls", "--cache-dir", "mypy"
    checked(sys.executable, "-m", "mypy", *options, "--python-executable", installed)


def test_pyright_accepts_right_uses_and_no_wrong_ones(installed, checked, tmp_path):
    places = [str(Path(sys.executable).parent), os.environ["PATH"]]
    pyright = shutil.which("pyright", path=os.pathsep.join(places))
    if pyright is None:
        pytest.skip("pyright is not installed")
    (tmp_path / "pyrightconfig.json").write_text(
        '{"reportUnnecessaryTypeIgnoreComment": "error", "reportMissingModuleSource": "none"}'
    )
    checked(pyright, "--pythonpath", installed)
