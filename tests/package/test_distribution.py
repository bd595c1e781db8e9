"""What is in the wheel and in the sdist, and what the metadata promise."""

import re
import tarfile
import zipfile
from datetime import date
from email import message_from_string
from pathlib import Path

import torchlinop

ROOT = Path(__file__).parents[2]


def test_the_wheel_holds_the_package_its_types_and_its_license_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(p.relative_to(ROOT)) for p in ROOT.glob("torchlinop/**/*.py")}
    assert modules | {"torchlinop/py.typed"} <= set(names)
    assert {name.split("/")[0] for name in names} == {
        "torchlinop",
        f"torchlinop-{torchlinop.__version__}.dist-info",
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_holds_what_is_needed_to_test_it(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    top = "README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md LICENSE CITATION.cff pyproject.toml"
    assert {*top.split()} <= names
    assert {"tests/conftest.py", "examples/01_hessian_eigenvalues.py", "docs/lanczos.md"} <= names
    assert not [name for name in names if "__pycache__" in name or "_build" in name]


def test_the_metadata_name_the_core_dependencies_alone(built):
    (wheel,) = built.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
    metadata = message_from_string(archive.read(name).decode())
    required = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert {re.split("[<>=]", r)[0] for r in required} == {"torch", "scipy", "numpy", "tqdm"}
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Version"] == torchlinop.__version__


def test_version_and_year_are_the_same_wherever_they_are_written():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {torchlinop.__version__}\n" in citation
    (written,) = re.findall(r"^date-released: (\S+)$", citation, re.MULTILINE)
    assert f"(c) {date.fromisoformat(written).year} " in (ROOT / "LICENSE").read_text()
