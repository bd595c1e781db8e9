"""The public names and their signatures are those in the list; so is what is said of them."""

import difflib
import importlib
import inspect
from pathlib import Path

import public_api
import pytest

HERE = Path(__file__).parent
LISTED = HERE / "public_api.txt"


def test_the_public_api_does_not_change_unnoticed():
    now = list(public_api.lines())
    changes = difflib.unified_diff(
        LISTED.read_text().splitlines(), now, "listed", "now", n=0, lineterm=""
    )
    told = "\n".join(changes)
    assert not told, (
        f"the public API has changed:\n{told}\nIf it should, run\n"
        "    python tests/package/public_api.py > tests/package/public_api.txt\n"
        "and write a line into CHANGELOG.md. What is renamed or removed is deprecated first, see "
        "docs/compatibility.md"
    )


MODULES = [line for line in LISTED.read_text().splitlines() if line and not line[0].isspace()]


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_there_and_explained(name):
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", []):
        thing = getattr(module, public)
        made = inspect.isclass(thing) or inspect.isfunction(thing)
        assert not made or (thing.__doc__ or "").strip(), public
