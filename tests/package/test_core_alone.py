"""Without any optional package, the core imports and works, and says what is missing for more."""

import json
import re
import sys

import pytest

OPTIONAL = [
    "accelerate", "cupy", "cupyx", "curvlinops", "hessian_eigenthings", "hypothesis", "lightning",
    "matplotlib", "pandas", "primme", "pyhessian", "pytest", "pytorch_lightning", "safetensors",
    "sklearn", "slepc4py", "transformer_lens", "transformers", "triton",
]  # fmt: skip

BLOCKED = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}, as if", name=name)

sys.meta_path.insert(0, Refuse())
"""


def test_eigenvalues_are_found_by_eigsh_and_by_lanczos(run):
    script = BLOCKED + (
        "import torch\n"
        "from scipy.sparse.linalg import eigsh\n"
        "from torchlinop import HessianOperator, as_linear_operator, lanczos, trace\n"
        "torch.manual_seed(0)\n"
        "model = torch.nn.Linear(6, 2).double()\n"
        "data = [(torch.randn(9, 6).double(), torch.randint(0, 2, (9,)))]\n"
        "loss = lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1])\n"
        "H = HessianOperator(model, data, loss)\n"
        "dense = torch.linalg.eigvalsh(H.to_dense())[-2:]\n"
        "scipy = torch.tensor(eigsh(as_linear_operator(H), 2, which='LA')[0])\n"
        "ours = lanczos(H, 2, which='LA', tol=1e-10).eigenvalues.flip(0)\n"
        "assert torch.allclose(scipy, dense) and torch.allclose(ours, dense)\n"
        "assert abs(trace(H, 14).estimate - H.to_dense().trace()) < 1e-10\n"
        "import torchlinop; print(torchlinop.__file__)\n"
    )
    assert "site-packages" in run(script)


def test_importing_the_package_imports_nothing_optional_and_no_slow_part_of_scipy(run):
    scipy = ["scipy.sparse.linalg", "scipy.special", "scipy.stats"]
    heavy = [*OPTIONAL, *scipy, "torch.distributed.fsdp", "torch._inductor"]
    script = f"import torch; before = set(sys.modules); import torchlinop\nfound = {heavy!r}\n"
    script += "print([name for name in found if name in set(sys.modules) - before])"
    assert run(f"import sys; {script}").strip() == "[]"


WAYS = [
    ("lanczos(A, 1).save('r.safetensors')", "safetensors; run: pip install safetensors"),
    ("lanczos(A, 1).to_dataframe()", "pandas; run: pip install pandas"),
    ("lanczos(A, 1).plot()", "matplotlib; run: pip install matplotlib"),
    ("spectral_density(A, 1, 2).plot()", "matplotlib; run: pip install matplotlib"),
    ("as_cupy_operator(A)", 'CuPy: pip install "torchlinop[cuda'),
    ("hugging_face_callback(watch)", 'transformers; run: pip install "torchlinop[hf]"'),
    ("lightning_callback(watch)", 'lightning; run: pip install "torchlinop[lightning]"'),
    ("digits()", 'pip install "torchlinop[demo]"'),
]


@pytest.fixture(scope="module")
def messages(run):
    """What each of the calls says."""
    script = BLOCKED + (
        "import json\n"
        "import torch\n"
        "from torchlinop import *\n"
        "from torchlinop.callbacks import *\n"
        "from torchlinop.testing.digits import digits\n"
        "A = MatrixOperator(torch.eye(4))\n"
        "watch = CurvatureWatch(lambda model: A)\n"
        "said = []\n"
        f"for call in {[call for call, _ in WAYS]!r}:\n"
        "    try:\n        said.append(repr(eval(call)))\n"
        "    except (TorchlinopError, ModuleNotFoundError) as error:\n"
        "        said.append(str(error))\n"
        "print(json.dumps(said))\n"
    )
    return dict(zip([call for call, _ in WAYS], json.loads(run(script)), strict=True))


@pytest.mark.parametrize(("call", "message"), WAYS, ids=[call for call, _ in WAYS])
def test_what_is_missing_is_named_with_the_line_that_installs_it(call, message, messages):
    assert message in messages[call]


def test_every_name_asked_for_above_is_one_of_an_optional_package():
    assert not {*OPTIONAL} & {"torch", "scipy", "numpy", "tqdm", *sys.builtin_module_names}
    assert all(re.fullmatch("[a-z0-9_]+", name) for name in OPTIONAL)


def test_names_that_are_imported_when_asked_for_are_there_as_all_others():
    import torchlinop
    from torchlinop.adapters import cupy_solvers, scipy
    from torchlinop.operators import kfac

    assert torchlinop.as_linear_operator is scipy.as_linear_operator
    assert torchlinop.cupy_eigsh is cupy_solvers.cupy_eigsh
    assert torchlinop.KFACOperator is kfac.KFACOperator
    assert set(torchlinop.__all__) <= set(dir(torchlinop))
    assert all(hasattr(torchlinop, name) for name in torchlinop.__all__)
    with pytest.raises(AttributeError, match="'torchlinop' has no attribute 'as_linear'"):
        torchlinop.as_linear  # noqa: B018
