"""The code blocks of the README and of docs/ run, top to bottom, page by page; so do docstrings."""

import doctest
import importlib
import inspect
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

import torchlinop
from torchlinop.command_line import main

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.MULTILINE | re.DOTALL
GENERATED = {"_build", "gallery", "generated"}
PAGES = [
    ROOT / "README.md",
    *sorted(p for p in DOCS.rglob("*.md") if not GENERATED & set(p.relative_to(DOCS).parts)),
]
MODULES = [m.name for m in pkgutil.walk_packages(torchlinop.__path__, "torchlinop.")]


def pages(function):
    return pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))(function)


@pages
def test_code_blocks_run(page, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), BLOCK)
    namespace = {}
    for block in blocks:
        if "import" in block or namespace:  # a block before the first import is a picture
            exec(compile(block, str(page), "exec"), namespace)
    assert namespace or not any("import" in block for block in blocks)


@pages
def test_commands_run_on_the_file_above_them(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"^```python\n(# (\w+\.py)\n.*?)^```", page.read_text(), BLOCK):
        Path(block[1]).write_text(block[0])
    for line in re.findall(r"^torchlinop (\w+ \w+\.\w+[^\n]*)$", page.read_text(), re.MULTILINE):
        if Path(re.split(r"[ :]", line)[1]).exists():
            if "--plot" in line:
                pytest.importorskip("matplotlib")
            assert main(shlex.split(line)) == 0, capsys.readouterr().err


@pages
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


def test_every_public_name_is_in_the_reference():
    api = (ROOT / "tests/package/public_api.txt").read_text()
    public = set(re.findall(r"^    (?:class )?(\w+)", api, re.MULTILINE))
    listed = set()
    for page in (DOCS / "reference").glob("*.rst"):
        listed |= set(re.findall(r"^   (\w+)$", page.read_text(), re.MULTILINE))
    assert sorted(public - listed - {"warn_caller"}) == []  # which the library calls


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_every_example_has_a_title_and_says_what_it_shows(example):
    doc = inspect.cleandoc(re.match(r'"""(.*?)"""', example.read_text(), re.DOTALL)[1])
    title, line, *_ = doc.splitlines()
    assert re.fullmatch("=+", line)
    assert len(line) == len(title)
    assert len(doc.splitlines()) > 3


@pytest.mark.parametrize(
    ("page", "quoted"),
    [
        ("benchmarks/products.md", "1.61 2.04"),
        ("benchmarks/gauss_newton/products.md", "1.94 1.97"),
        ("benchmarks/long_vectors/solvers.md", "4,000,000"),
        ("benchmarks/estimators/solvers.md", "0.84 0.88 0.96 1.00 1.1e-03 3.2e-03"),
        ("cross_validation.md", "7,320"),
        ("concepts/differences.md", "7e-16 4.2"),
    ],
)
def test_numbers_of_the_readme_are_those_of_the_tables(page, quoted):
    readme, table = (ROOT / "README.md").read_text(), (DOCS / page).read_text()
    for number in quoted.split():
        assert number in readme
        assert number in table


def test_claims_of_solvers_hold_as_often_as_the_readme_says():
    rows = (DOCS / "benchmarks/solvers/solvers.md").read_text().splitlines()
    readme = (ROOT / "README.md").read_text()
    for solver, written in (
        ("torchlinop", "{} of {} rows"),
        ("hessian-eigenthings", "in {} of {};"),
    ):
        own = [row for row in rows if row.startswith(f"| {solver} ")]
        holds, fails = (sum(f"| {said}" in row for row in own) for said in ("yes |", "NO ("))
        assert written.format(holds, holds + fails) in readme


def test_the_mean_of_batch_means_is_as_far_off_as_the_page_on_differences_says():
    theirs = pytest.importorskip("hessian_eigenthings")
    page = (DOCS / "concepts/differences.md").read_text()
    namespace = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], namespace)
    H, model, batches = (namespace[name] for name in ("H", "model", "batches"))
    A = theirs.HessianOperator(model, batches, namespace["loss_fn"])
    off = H.new_tensor([0.0])
    for j, e in enumerate(H.new_ones(len(H)).diag()):
        off += (A.matvec(e) - H[:, j]).square().sum()
    assert f"off by {float(off.sqrt() / H.norm()):.1f} times the norm" in page


def test_the_first_line_of_the_readme_block_is_the_main_sentence():
    assert (
        "eigsh(as_linear_operator(HessianOperator(model, data, loss_fn)), k=10)"
        in (ROOT / "README.md").read_text()
    )
