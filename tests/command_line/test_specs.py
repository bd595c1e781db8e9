"""What build() may return, and which matrix the options then ask for."""

import json
import re

import pytest
import torch

from torchlinop.command_line import main

QUICK = ["--max-matvecs", "20"]
DATA = "[(torch.randn(n, 6), torch.randint(0, 3, (n,))) for n in (9, 5)]"
MODEL = "nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))"


def returning(spec, what, **parts):
    lines = [f"    {name} = {value}" for name, value in parts.items()]
    before = [f"    model = {MODEL}", f"    data = {DATA}"]
    return spec("\n".join(["def build():", *before, *lines, f"    return {what}"]))


def trace_of(capsys, *words):
    assert main(["trace", *QUICK, *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


FORMS = {
    "tuple": "model, data, nn.CrossEntropyLoss()",
    "another order": "model, nn.CrossEntropyLoss(), data",
    "functional": "model, data, F.cross_entropy",
    "no loss": "model, data",
    "function": "model, data, lambda m, b: F.cross_entropy(m(b[0]), b[1])",
    "dict": "{'model': model, 'data': data, 'loss': F.cross_entropy}",
    "dict with forward": "{'model': model, 'data': data, 'forward': lambda m, b: m(b[0]), "
    "'loss': lambda f, b: F.cross_entropy(f, b[1])}",
    "generator": "model, (batch for batch in data), nn.CrossEntropyLoss()",
    "option": "{'model': model, 'data': data, 'loss': F.cross_entropy, 'microbatch_size': 2}",
    "operator": "gallery and __import__('torchlinop').HessianOperator("
    "model, data, lambda m, b: F.cross_entropy(m(b[0]), b[1]))",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_hessian(form, spec, capsys):
    expected = trace_of(capsys, returning(spec, FORMS["tuple"]))
    found = trace_of(capsys, returning(spec, FORMS[form]))
    assert found["estimate"] == pytest.approx(expected["estimate"], rel=1e-4)
    assert "HessianOperator 53x53" in found["operator"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("ggn", "GGNOperator"),
        ("fisher", "FisherOperator"),
        ("empirical-fisher", "EmpiricalFisherOperator"),
        ("kfac", "KFACOperator"),
        ("ekfac", "EKFACOperator"),
    ],
)
def test_a_loss_of_torch_gives_every_matrix(kind, name, mlp, capsys):
    found = trace_of(capsys, mlp, "--operator", kind)
    assert found["operator"].startswith(f"<{name} 53x53")


def test_traces_of_ggn_fisher_and_ekfac_are_one(mlp, capsys):
    kinds = ("ggn", "fisher", "ekfac")
    words = ["--max-matvecs", "53"]
    traces = []
    for kind in kinds:
        assert main(["trace", mlp, "--operator", kind, *words, "--json"]) == 0
        traces.append(json.loads(capsys.readouterr().out)["estimate"])
    assert traces == pytest.approx(traces[:1] * 3, rel=1e-5)


def test_a_module_of_ones_own_is_a_loss_of_outputs_and_targets(spec, capsys):
    own = """
class Own(nn.Module):
    def forward(self, outputs, targets):
        return F.cross_entropy(outputs, targets)

def build():
    torch.manual_seed(0)
    return nn.Linear(6, 3), [(torch.randn(9, 6), torch.randint(0, 3, (9,)))], Own()
"""
    torchs = own.replace("Own()\n", "nn.CrossEntropyLoss()\n")
    ggn = ["--operator", "ggn", "--max-matvecs", "21"]
    mine, theirs = (trace_of(capsys, spec(source), *ggn) for source in (own, torchs))
    assert mine["estimate"] == pytest.approx(theirs["estimate"])


def test_a_pattern_selects_parameters(mlp, capsys):
    assert "18x18" in trace_of(capsys, mlp, "--params", "2.*")["operator"]
    both = trace_of(capsys, mlp, "--params", "0.bias", "--params", "*.weight")
    assert "50x50" in both["operator"]


def test_a_pattern_restricts_an_operator(spec, capsys):
    made = returning(spec, FORMS["operator"])
    assert "Restriction 18x18" in trace_of(capsys, made, "--params", "2.*")["operator"]


def test_dtype_and_device_are_those_asked_for(mlp, capsys):
    found = trace_of(capsys, mlp, "--dtype", "float64", "--device", "cpu")
    assert "53x53 float64 cpu" in found["operator"]


@pytest.mark.parametrize("data", ["DataLoader(TensorDataset(x, y), 4)", "(x, y)", "iter([(x, y)])"])
def test_data_of_every_kind_are_cast(data, spec, capsys):
    source = """
def build():
    x, y = torch.randn(9, 6), torch.randint(0, 3, (9,))
    return nn.Linear(6, 3), DATA, nn.CrossEntropyLoss()
"""
    found = trace_of(capsys, spec(source.replace("DATA", data)), "--dtype", "float64")
    assert "21x21 float64" in found["operator"]


def test_the_seed_makes_a_spec_without_one_the_same_model_every_time(mlp, capsys):
    torch.rand(3)
    first = trace_of(capsys, mlp)
    torch.rand(5)
    assert trace_of(capsys, mlp)["estimate"] == first["estimate"]
    assert trace_of(capsys, mlp, "--seed", "1")["estimate"] != first["estimate"]


def test_what_build_prints_does_not_get_into_the_answer(spec, capsys):
    source = "def build():\n    print('training')\n    return torch.eye(3)"
    assert main(["trace", spec(source), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["estimate"] == 3.0
    assert "training" in err


def test_a_file_finds_its_neighbours_and_may_be_called_as_a_module_in_use(tmp_path, capsys):
    (tmp_path / "neighbour_of_this_spec.py").write_text("import torch\nI = torch.eye(3)\n")
    (tmp_path / "random.py").write_text(
        "from neighbour_of_this_spec import I\ndef build(): return I"
    )
    assert main(["trace", f"{tmp_path}/random.py:build"]) == 0
    assert __import__("random").random() < 1


WRONG = {
    "None": "expected build() to return (model, data, loss), a dict of these, or an operator, got",
    "3": "expected build() to return (model, data, loss), a dict of these, or an operator, got",
    "'abc'": "expected build() to return (model, data, loss), a dict",
    "(data, data)": "expected build() to return (model, data, loss), a dict",
    "model": "expected build() to return (model, data, loss), got a Sequential alone",
    "(model, data, data)": "of which the loss can be called, got (Sequential, list, list)",
    "(model, data, F.mse_loss, 3)": "of which the loss can be called, got (Sequential, list, ",
    "(model, F.cross_entropy)": "expected the data of build() to be batches, got a function",
    "(model, None, F.cross_entropy)": "expected the data of build() to be batches, got a NoneType",
    "{'model': 3, 'data': data}": "expected the model of build() to be a torch.nn.Module, got",
    "{'model': model, 'data': data, 'loss': 3}": "expected the loss of build() to be a function",
    "{'model': model, 'data': data, 'forward': 3}": "expected the forward of build() to be a func",
    "{'model': model}": "expected the data of build() to be batches, got a NoneType",
    "{'model': model, 'data': data, 'lost': 3}": "unknown option 'lost'; did you mean one of",
    "(data, model)": "expected the model of build() to be a torch.nn.Module, got a list",
    "object()": "expected build() to return (model, data, loss), a dict of these, or an operator",
    "torch.ones(2, 3)": "expected",
    "(model, [], F.cross_entropy)": "the data gave no batches",
    "(model, data, lambda x: x)": "which does not take two arguments; pass",
    "(model, data, nn.MSELoss)": "got the class MSELoss; return one of it, MSELoss()",
    "(model, 'data.pt', F.mse_loss)": "expected the data of build() to be batches, got a str",
    "(nn.MSELoss(), data, model)": "expected the model of build() to be a torch.nn.Module, got",
    "{'net': model, 'data': data}": "to have the keys model, data and loss, got net, data; see",
}


@pytest.mark.parametrize("what", WRONG)
def test_what_build_should_not_return_is_one_sentence_and_code_2(what, spec, capsys):
    assert main(["trace", returning(spec, what)]) == 2
    out, error = capsys.readouterr()
    assert WRONG[what] in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--operator", "ggn"], "expected a loss of the model's outputs for --operator ggn, got"),
        (["--device", "nowhere"], "expected a device of this machine, got 'nowhere'"),
        (["--params", "encoder.*"], "param_filter matches none of the 4 trainable parameters"),
        (["--seed", "-1"], "expected seed to be an integer of at least 0, got -1"),
    ],
)
def test_an_option_that_does_not_fit_is_one_sentence_and_code_2(words, sentence, spec, capsys):
    assert main(["trace", returning(spec, FORMS["function"]), *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["eigs", "-k", "100"], "expected k from 1 to n = 53, got 100"),
        (["eigs", "--tol", "2"], "expected tol from 0 to 1, relative to |λ|, got 2.0"),
        (["eigs", "--ncv", "2"], "expected ncv from k + 1 = 11 to n = 53, got 2"),
        (["eigs", "--max-matvecs", "3"], "the budget of products, to be at least 10"),
        (["eigs", "--max-seconds", "0"], "expected max_seconds to be positive, got 0.0"),
        (["trace", "--rtol", "0"], "expected rtol to be above 0, got 0.0"),
        (["trace", "--max-matvecs", "0"], "expected num_matvecs"),
        (["density", "--probes", "0"], "expected at least one probe and step, got 0 probes"),
        (["density", "--points", "1"], "expected two grid points or more, got 1"),
    ],
)
def test_a_number_that_does_not_fit_is_one_sentence_and_code_2(words, sentence, mlp, capsys):
    command, *options = words
    assert main([command, mlp, *options]) == 2
    out, error = capsys.readouterr()
    assert sentence in error
    assert error.count("\n") == 1
    assert not out


@pytest.mark.parametrize("name", ["operator", "device", "dtype"])
def test_an_operator_has_its_own_kind_device_and_dtype(name, spec, capsys):
    value = {"operator": "ggn", "device": "cpu", "dtype": "float32"}[name]
    assert main(["trace", returning(spec, "torch.eye(3)"), f"--{name}", value]) == 2
    assert f"build() returned a Tensor, which has its own {name}; leave" in capsys.readouterr().err


def test_an_error_of_the_model_is_one_sentence_unless_asked_for_more(spec, capsys):
    wrong = returning(spec, "model, data, lambda m, b: F.cross_entropy(m(b[1]), b[1])")
    assert main(["trace", wrong]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: RuntimeError: ")
    assert re.search(r" \(model_\w+\.py, line \d+\); pass --verbose to see all of it\n$", error)
    assert main(["trace", wrong, "--verbose"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_function_of_outputs_and_targets_is_told_how_it_was_called(spec, capsys):
    made = returning(spec, "model, data, lambda outputs, targets: F.mse_loss(outputs, targets)")
    assert main(["trace", made]) == 2
    error = capsys.readouterr().err
    assert "error: loss(model, batch) raised " in error
    assert 'return a dict with "forward", for one of (outputs, targets) a module' in error


@pytest.mark.parametrize("source", ["import not_there_at_all", "def build(:"])
def test_a_file_that_is_there_and_cannot_be_imported_is_not_looked_for(source, spec, capsys):
    assert main(["trace", spec(source)]) == 2
    error = capsys.readouterr().err
    assert "could not import" in error
    assert error.endswith("; pass --verbose to see where\n")


def test_verbose_shows_what_build_raised(spec, capsys):
    assert main(["trace", spec("def build():\n    raise KeyError('what')"), "-v"]) == 2
    error = capsys.readouterr().err
    assert "in build" in error
    assert "raised KeyError: 'what'; pass --verbose to see where" in error
