"""The package as a user installs it: its wheel, in an environment of its own."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The folder of a fresh wheel and sdist."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    script = (
        "import sys; from hatchling.build import build_sdist, build_wheel;"
        "build_wheel(sys.argv[1]); build_sdist(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", script, folder], cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="session")
def installed(built, tmp_path_factory):
    """The Python of an environment that holds the wheel, and sees the packages installed here.

    Of a checkout that is installed editable it sees nothing.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=os.name != "nt")
    name = "Lib/site-packages" if os.name == "nt" else "lib/python*/site-packages"
    (packages,) = folder.glob(name)
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(packages)
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


@pytest.fixture(scope="session")
def run(installed, tmp_path_factory):
    """Runs a script there, away from the checkout; its output."""

    def of(script):
        done = subprocess.run(
            [installed, "-c", script],
            cwd=tmp_path_factory.mktemp("elsewhere"), capture_output=True, text=True, check=False,
            env={k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return of
