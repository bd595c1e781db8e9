"""``torchlinop doctor`` names the cause in every situation that libraries of curvature fail in."""

import json

import pytest
import torch

from torchlinop.command_line import main

X = "torch.randn(12, 6)"
Y = "torch.randint(0, 3, (12,))"
BATCHES = "[(torch.randn(n, 6), torch.randint(0, 3, (n,))) for n in (9, 3)]"
MODEL = "nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))"
LOSS = "nn.CrossEntropyLoss()"
RETURNS = "return model, data, loss"


def situation(*lines, model=MODEL, data=BATCHES, loss=LOSS, returns=RETURNS, before=""):
    body = [f"model = {model}", f"data = {data}", f"loss = {loss}", *lines, returns]
    return before + "\ndef build():\n" + "".join(f"    {line}\n" for line in body)


LOADER = f"DataLoader(TensorDataset({X}, {Y}), 5, shuffle=True"
AUGMENTED = """
class Augmented(Dataset):
    def __len__(self): return 12
    def __getitem__(self, i): return torch.randn(6) + i, i % 3
"""
DIRECT = """
class Flash(nn.Module):
    def forward(self, x):
        q = x[:, None]
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0][:, 0]
"""
MIXED = """
class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3).double()
    def forward(self, x):
        return self.second(torch.tanh(self.first(x.float())).double())
"""
GIVEN = "return {'model': model, 'data': data, 'loss': loss, "
OF_TOKENS = "[(torch.randint(0, 7, (4,)), torch.randint(0, 7, (4,)))]"
PROBLEM = "p = gallery.{}\n    return p.model, p.batches, p.loss_fn"

# What is fine, and what is said of it.
WORKS = {
    "uneven batches": (situation(), "2 uneven batches of 9, 3 samples, weighted by loss terms"),
    "microbatches": (situation(returns=f"{GIVEN}'microbatch_size': 4}}"), "in 4 batches"),
    "masked labels": (
        situation("data[0][1][:3] = -100"),
        "mean over unmasked labels",
    ),
    "shuffling": (situation(data=f"{LOADER})"), "shuffled (RandomSampler): two passes give"),
    "a loader": (situation(data=f"{LOADER.replace('True', 'False')})"), "two passes give the same"),
    "a generator": (situation(data="iter(data)").replace("= iter(data)", f"= iter({BATCHES})"),
                    "a list_iterator is empty after one pass, which is kept"),
    "frozen": (situation("model[0].requires_grad_(False)"), "2 frozen (0.weight, 0.bias)"),
    "tied": (
        "def build():\n    " + PROBLEM.format("tied()"), "1 tied (head.weight = embed.weight)",
    ),
    "functional loss": (situation(loss="F.cross_entropy"), "12 samples in 2 batches"),
    "checkpointing": ("def build():\n    " + PROBLEM.format("checkpointed()"), "autograd, rebuilt"),
    "a wrapper": (situation(model=f"nn.DataParallel({MODEL})"), "module inside of DataParallel"),
    "a compiled model": (
        situation(model=f"torch.compile({MODEL})"), "module inside of OptimizedModule",
    ),
    "forward over reverse": (
        situation(
            data="[(torch.randn(9, 6), torch.randn(9, 3))]", loss="F.mse_loss",
            returns=f"{GIVEN}'method': 'forward_over_reverse'}}",
        ),
        "symmetric",
    ),
    "autocast": (situation("torch.set_autocast_enabled('cpu', True)"), "autocast off"),
    "mixed dtypes": (
        situation("data = [(x.double(), y) for x, y in data]", model="Mixed()", before=MIXED),
        "in float32, float64",
    ),
    "sparse": (
        situation(model="nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 7))",
                  data=OF_TOKENS),
        "symmetric",
    ),
    "one batch": (situation("data = data[0]"), "1 batch of 9 samples"),
    "named parts": (
        situation("data = [{'inputs': x, 'labels': y} for x, y in data]"), "in 2 batches",
    ),
    "without gradients": (situation("torch.set_grad_enabled(False)"), "symmetric"),
    "attention": ("def build():\n    " + PROBLEM.format("gpt2()"), "attention by its mathematical"),
    "a recurrent network": ("def build():\n    " + PROBLEM.format("recurrent()"), "symmetric"),
}  # fmt: skip
# What is not what it seems.
WARNS = {
    "augmentation": (
        situation(data="DataLoader(Augmented(), 5)", before=AUGMENTED),
        "two passes give other samples (random augmentation)",
    ),
    "samples dropped": (
        situation(data=f"{LOADER}, drop_last=True)"),
        "two passes give other samples (RandomSampler with drop_last=True)",
    ),
    "dropout": (
        situation(model=MODEL.replace("nn.Tanh()", "nn.Dropout()")), "1 Dropout and 0 BatchNorm",
    ),
    "batch norm": (
        situation(model=MODEL.replace("nn.Tanh()", "nn.BatchNorm1d(5)")),
        "0 Dropout and 1 BatchNorm modules were evaluated in eval mode",
    ),
    "unused parameters": (
        situation(
            "model.spare = nn.Linear(2, 2)",
            "loss = lambda m, b: F.cross_entropy(m[:3](b[0]), b[1])",
        ),
        "UnusedParameterWarning: 2 of 6 tensors",
    ),
    "bfloat16": (
        situation("model.bfloat16()", "data = [(x.bfloat16(), y) for x, y in data]"),
        "PrecisionWarning: product noise is",
    ),
}  # fmt: skip
# What is no matrix.
FAULTS = {
    "losses": (
        situation(loss="lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction='none')"),
        "LossShapeError: loss_fn returned shape (9,), expected a scalar",
    ),
    "a detached loss": (
        situation(loss="lambda m, b: F.cross_entropy(m(b[0]).detach(), b[1])"),
        "LossShapeError: the loss does not require grad",
    ),
    "unreduced": (situation(loss="nn.CrossEntropyLoss(reduction='none')"), 'reduction="none"; '),
    "NaN in the data": (
        situation("data[1][0][0, 0] = torch.nan"),
        "batch 1 holds 1 NaN or infinite entries, in its tensor 0; clean the data",
    ),
    "NaN in the model": (
        situation("model[0].bias.data[1] = torch.nan"),
        "parameter 0.bias holds 1 NaN or infinite entries",
    ),
    "reentrant checkpointing": (
        "def build():\n    " + PROBLEM.format("checkpointed(use_reentrant=True)"),
        "CheckpointError: the model uses reentrant checkpointing",
    ),
    "no data": (situation(data="[]"), "EmptyDataError: the data gave no batches"),
    "a generator that is not kept": (
        situation(returns=f"{GIVEN}'pin_data': False}}", data=f"iter({BATCHES})"),
        "OneShotDataError: the data are a list_iterator: empty after the first product",
    ),
    "shuffling that is not kept": (
        situation(returns=f"{GIVEN}'pin_data': False}}", data=f"{LOADER}, drop_last=True)"),
        "Cause: RandomSampler with drop_last=True",
    ),
    "an attention kernel": (
        situation(
            model="nn.Sequential(nn.Linear(6, 8), Flash(), nn.Linear(8, 3))", before=DIRECT,
            data="[(torch.randn(3, 5, 6), torch.randn(3, 5, 3))]", loss="nn.MSELoss()",
        ),
        "(module 1) has no second derivative",
    ),
    "a loss of another form": (
        situation(loss="lambda outputs, y: F.cross_entropy(outputs, y)"),
        "OptionError: loss(model, batch) raised TypeError: ",
    ),
    "weights unknown": (
        situation("w = torch.tensor([.1, 1, 7])",
                  "loss = lambda m, b: F.cross_entropy(m(b[0]), b[1], weight=w)"),
        "WeightingError: the batches",
    ),
    "a random product": (
        "def build():\n    from torchlinop import LambdaOperator\n"
        "    return LambdaOperator(9, lambda v: v + 0.1 * torch.randn(9))",
        "not repeatable: two products with one v differ by",
    ),
    "an asymmetric product": (
        "def build():\n    from torchlinop import LambdaOperator\n"
        "    return LambdaOperator(9, lambda v: v.roll(1))",
        "not symmetric: <u, A v> and <A u, v> differ by",
    ),
    "a nonlinear product": (
        "def build():\n    from torchlinop import LambdaOperator\n"
        "    return LambdaOperator(9, lambda v: v.abs())",
        "not linear: A (u + v) and A u + A v differ by",
    ),
    "a product with NaN": (
        "def build():\n    from torchlinop import LambdaOperator\n"
        "    return LambdaOperator(9, lambda v: v * torch.nan)",
        "FAULT   product  holds NaN or infinity",
    ),
    "a matrix that is not positive": (
        "def build():\n    from torchlinop import LambdaOperator\n"
        "    A = LambdaOperator(9, lambda v: -v)\n    A.positive_semidefinite = True\n    return A",
        "the matrix is not positive",
    ),
}  # fmt: skip
ALL = {"ok": WORKS, "warning": WARNS, "FAULT": FAULTS}
CASES = [(level, name) for level, cases in ALL.items() for name in cases]


@pytest.mark.parametrize(("level", "name"), CASES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_cause_is_named(level, name, spec, capsys):
    source, cause = ALL[level][name]
    try:
        code = main(["doctor", spec(source)])
    finally:  # what a spec may have switched
        torch.set_grad_enabled(True)
        torch.set_autocast_enabled("cpu", False)
    out, error = capsys.readouterr()
    assert cause in out
    assert code == (level == "FAULT")
    assert ("\n  warning " in out) >= (level == "warning")
    assert "Traceback" not in out + error


def test_coverage_of_kfac_is_examined(spec, capsys):
    norm = situation(model="nn.Sequential(nn.Linear(6, 5), nn.PReLU(), nn.Linear(5, 3))")
    assert main(["doctor", spec(norm), "--operator", "kfac"]) == 1
    assert "KFACCoverageError: K-FAC covers" in capsys.readouterr().out


def test_the_verdict_counts(spec, capsys):
    main(["doctor", spec(situation())])
    assert capsys.readouterr().out.endswith("\nnothing is wrong\n")
    both = situation(
        "data[1][0][0, 0] = torch.nan", model=MODEL.replace("nn.Tanh()", "nn.Dropout()")
    )
    main(["doctor", spec(both)])
    assert capsys.readouterr().out.endswith("\n2 faults and 1 warning\n")


def test_the_model_is_as_it_was(spec, capsys):
    assert main(["doctor", spec(situation())]) == 0
    assert "is as it was, bit for bit" in capsys.readouterr().out


def test_positive_matrices_are_seen_to_be(spec, capsys):
    assert main(["doctor", spec(situation()), "--operator", "ggn"]) == 0
    assert "positive: <v, A v> = " in capsys.readouterr().out


def test_a_report_is_one_json_object(spec, capsys):
    assert main(["doctor", spec(situation("data[1][0][0, 0] = torch.nan")), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    assert {"level", "subject", "text"} == set(found["findings"][0])
    assert "torch " in found["environment"]["versions"]


def test_without_a_spec_the_environment_is_reported(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "torchlinop 0" in out
    assert "cpu (1 threads" in out
    assert "safetensors" in out


def test_a_spec_of_no_use_is_bad_input(spec, capsys):
    assert main(["doctor", spec("def build(): return 3")]) == 2
    assert "expected build() to return" in capsys.readouterr().err
