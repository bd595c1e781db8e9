"""What SECURITY.md promises: nothing is unpickled, nothing in a page is executed."""

import ast
import json
import pickle
from pathlib import Path

import pytest
import torch

import torchlinop
from torchlinop import EigenResult, MatrixOperator, lanczos
from torchlinop.errors import OptionError, TorchlinopError
from torchlinop.tensor_file import read, write

PACKAGE = Path(torchlinop.__file__).parent
MODULES = sorted(PACKAGE.glob("**/*.py"))

UNSAFE = {
    "pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib",
    "eval", "exec", "torch.load", "yaml.load", "os.system", "numpy.load", "np.load",
    "torch.distributed.checkpoint",
}  # fmt: skip
# What SECURITY.md says of processes of one group, and of the folders they write.
ALLOWED = {
    "union.py": {"pickle"},
    "distributed/drive.py": {"pickle"},
    "folder_ranks.py": {"torch.distributed.checkpoint"},
}


def names_used(tree):
    """Modules imported, and dotted names and functions called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Call):
            yield ast.unparse(node.func)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_unpickles_or_evaluates(path):
    found = UNSAFE & {*names_used(ast.parse(path.read_text()))}
    assert found <= ALLOWED.get(str(path.relative_to(PACKAGE)), set())


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize("save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_a_pickle_is_refused_and_not_executed(save, tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "result.safetensors"
    save(Trap(), path)
    with pytest.raises(OptionError, match=r"cannot read .* as a safetensors file"):
        EigenResult.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 99},
        {"result": "Trap"},
        {"fields": {"dtype": {"dtype": "load"}}},
        {"fields": {"dtype": {"layout": {"slots": [["a"]]}}}},
        {"fields": 3},
    ],
    ids=["newer", "other class", "no dtype", "no layout", "no fields"],
)
def test_a_header_that_was_tampered_with_is_refused(change, tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "result.safetensors"
    lanczos(MatrixOperator(torch.eye(4)), 1).save(path)
    tensors, header = read(path, "cpu")
    write(path, tensors, header | change)
    with pytest.raises(OptionError):
        EigenResult.load(path)


def test_headers_are_json(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    path = tmp_path / "result.safetensors"
    lanczos(MatrixOperator(torch.eye(4)), 1).save(path)
    with safetensors.safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["torchlinop"])
    assert header["result"] == "EigenResult"


def test_a_page_escapes_what_it_prints(tmp_path):
    from torchlinop.compare import compare, eigensolver

    attack = "<script>alert('\"&\"')</script>"

    @eigensolver(f"{attack} solver")
    def failing(op, request):
        raise TorchlinopError(attack)

    found = compare(
        {attack: MatrixOperator(torch.diag(torch.arange(1.0, 31.0)))},
        2, "LA", [failing, "torchlinop lanczos"], seeds=1, seconds=5.0, histories=False,
    )  # fmt: skip
    page = Path(found.to_html(tmp_path / "page.html")).read_text()
    assert "&lt;script&gt;alert(" in page
    assert "<script>alert" not in page
    assert "http" not in page.replace("http://www.w3.org/", "")
