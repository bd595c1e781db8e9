"""The code blocks of the README and of docs/ run, top to bottom, page by page; so do docstrings."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import torchlinop

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = [m.name for m in pkgutil.walk_packages(torchlinop.__path__, "torchlinop.")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run(page, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    namespace = {}
    for block in blocks:
        if "import" in block or namespace:  # a block before the first import is a picture
            exec(compile(block, str(page), "exec"), namespace)
    assert namespace or not any("import" in block for block in blocks)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [t for t in targets if not (page.parent / t).exists()] == []
    assert page.stat().st_size > 0


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_give_what_they_show(name):
    module = importlib.import_module(name)
    names = {"torch": importlib.import_module("torch"), "np": importlib.import_module("numpy")}
    assert doctest.testmod(module, extraglobs=names).failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_its_idea_in_its_first_line(name):
    doc = importlib.import_module(name).__doc__
    assert doc
    assert doc.splitlines()[0].strip()


def test_the_first_line_of_the_readme_block_is_the_main_sentence():
    assert (
        "eigsh(as_linear_operator(HessianOperator(model, data, loss_fn)), k=10)"
        in (ROOT / "README.md").read_text()
    )
