"""The code blocks of the README and of docs/ run, top to bottom, page by page; so do docstrings."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import torchlinop

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
GENERATED = {"_build", "gallery", "generated"}
PAGES = [
    ROOT / "README.md",
    *sorted(p for p in DOCS.rglob("*.md") if not GENERATED & set(p.relative_to(DOCS).parts)),
]
MODULES = [m.name for m in pkgutil.walk_packages(torchlinop.__path__, "torchlinop.")]
PUBLIC = [m for m in MODULES if m.count(".") == 1] + ["torchlinop"]
NOT_FOR_READERS = {"torchlinop.__main__", "torchlinop.demo", "torchlinop.bench"}


def pages(function):
    return pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))(function)


@pages
def test_code_blocks_run(page, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    namespace = {}
    for block in blocks:
        if "import" in block or namespace:  # a block before the first import is a picture
            exec(compile(block, str(page), "exec"), namespace)
    assert namespace or not any("import" in block for block in blocks)


@pages
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    built = {"gallery/index.rst"}  # from the examples, with the site
    assert [t for t in targets if not (page.parent / t).exists() and t not in built] == []
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


def exported(name):
    """The names of ``__all__``, and the classes of torchlinop.errors."""
    module = importlib.import_module(name)
    if name == "torchlinop.errors":
        return [n for n, _ in inspect.getmembers(module, inspect.isclass) if n[0] != "_"]
    return getattr(module, "__all__", [])


@pytest.mark.parametrize("name", sorted(set(PUBLIC) - NOT_FOR_READERS))
def test_every_public_name_is_in_the_reference(name):
    listed = set()
    for page in (DOCS / "reference").glob("*.rst"):
        listed |= set(re.findall(r"^   (\w+)$", page.read_text(), re.MULTILINE))
    assert [n for n in exported(name) if n not in listed] == []


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_every_example_has_a_title_and_says_what_it_shows(example):
    doc = inspect.cleandoc(re.match(r'"""(.*?)"""', example.read_text(), re.DOTALL)[1])
    title, line, *_ = doc.splitlines()
    assert re.fullmatch("=+", line)
    assert len(line) == len(title)
    assert len(doc.splitlines()) > 3


def test_the_first_line_of_the_readme_block_is_the_main_sentence():
    assert (
        "eigsh(as_linear_operator(HessianOperator(model, data, loss_fn)), k=10)"
        in (ROOT / "README.md").read_text()
    )
