"""The parts of ``bench gpu``: clocks, records, supervision, options that may be there, claims."""

import json
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

import torchlinop
from torchlinop import HessianOperator, MatrixOperator
from torchlinop.bench import (
    eigsh_stage,
    gpu_stages,
    gpu_tests,
    outcomes,
    product_stage,
    timing,
    worker,
)
from torchlinop.bench.candidates import CL, GGN, HE, HESSIAN, OURS
from torchlinop.bench.claims import Claim, claims
from torchlinop.bench.clock import Clock, TimeSpentError, shares
from torchlinop.bench.cross_entropy_stage import bandwidths
from torchlinop.bench.eigsh_stage import CUPYX, SCIPY, WAYS, Watched, copied_bytes
from torchlinop.bench.eigsh_stage import OURS as LANCZOS
from torchlinop.bench.gpu_report import document, text
from torchlinop.bench.gpu_workloads import WORKLOADS
from torchlinop.bench.peaks import peak_above
from torchlinop.bench.records import append, read
from torchlinop.bench.stages import Setting, Stage
from torchlinop.bench.supervisor import supervise
from torchlinop.bench.variants import keywords, variants
from torchlinop.bench.worker import ending
from torchlinop.compiled import Compiled
from torchlinop.traced import traced

CPU = torch.device("cpu")


class Hand:
    """A clock's hand that a test moves."""

    def __init__(self):
        self.time = 0.0

    def __call__(self):
        return self.time


def test_time_that_is_not_used_goes_to_later_stages_by_their_weights():
    now = Hand()
    found = []
    for clock, used in zip(shares([1, 1, 2], Clock.of(8.0, now)), [1.0, 2.0, 5.0], strict=True):
        found.append(clock.left)
        now.time += used
    assert found == [8 / 4, 7 / 3, 5.0]


def test_clock_stops_repetitions_and_refuses_late_work():
    now = Hand()
    clock = Clock.of(3.0, now)
    done = []
    for i in clock.repetitions(9, least=2):
        now.time += 2
        done.append(i)
    assert done == [0, 1]
    with pytest.raises(TimeSpentError, match="the time of this stage was spent"):
        clock.refuse_late()


def test_products_are_counted_and_end_with_the_clock():
    now = Hand()
    op = Watched(MatrixOperator(torch.eye(3)), Clock.of(1.0, now))
    op @ torch.ones(3, 2)
    now.time = 2.0
    with pytest.raises(TimeSpentError):
        op @ torch.ones(3)
    assert op.columns == 2


def test_records_are_read_back_without_the_line_that_was_cut_short(tmp_path):
    path = tmp_path / "records.jsonl"
    append(path, {"a": 1, "b": [float("nan"), {"c": float("inf")}]})
    with path.open("a") as file:
        file.write('{"a": 2, "b"')
    assert read(path) == [{"a": 1, "b": [None, {"c": None}]}]
    assert read(tmp_path / "none") == []


# A worker of three stages that writes what the real one does; "die" and "hang" do so once begun.
WORKER = """
import json, sys, time
for name in sys.argv[2:]:
    def write(**record):
        print(json.dumps({"stage": name, **record}), file=open(sys.argv[1], "a"))
    write(event="begun", seconds=-9.5)
    if "die" in name: sys.exit(7)
    if "hang" in name: time.sleep(60)
    write(event="ended", status="done", reason="", seconds=0.0)
"""


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "b"], {"a": "done", "b": "done"}),
        (["a", "die", "b"], {"a": "done", "die": "its process ended with 7", "b": "done"}),
        (["hang", "b", "die"], {"hang": "it took too long", "b": "done", "die": "7"}),
    ],
)
def test_stage_that_dies_or_hangs_costs_itself_alone(tmp_path, names, expected):
    records, reports = tmp_path / "records", []

    def command(left, seconds):
        return [sys.executable, "-c", WORKER, str(records), *left]

    log, total = tmp_path / "log", Clock.of(30.0)
    start = time.monotonic()
    supervise(
        names, command, records=records, log=log, total=total, report=lambda: reports.append(1)
    )
    ended = {r["stage"]: r["status"] + r["reason"] for r in read(records) if r["event"] == "ended"}
    assert list(ended) == names
    assert all(expected[name] in ended[name] for name in names)
    assert len(reports) >= len(names)
    assert time.monotonic() - start < 30


def test_stages_for_which_no_time_was_left_are_named(tmp_path):
    records = tmp_path / "records"
    supervise(
        ["a", "b"], lambda *_: [], records=records, log=tmp_path, total=Clock.of(0.0), report=int
    )
    assert [r["reason"] for r in read(records)] == ["no time was left"] * 2


class OfLater:
    def __init__(self, model, *, compile=False, cuda_graphs=False):
        """As an operator may be built one day."""


def test_options_are_used_where_an_operator_has_them():
    assert {"model", "linearization", "mode"} <= keywords(HessianOperator)
    assert variants(OfLater) == {
        "eager": {},
        "compile": {"compile": True},
        "cuda_graphs": {"cuda_graphs": True},
    }
    assert set(variants(MatrixOperator)) == {"eager"}


def test_way_that_an_operator_does_not_offer_is_said_to_be_missing(monkeypatch):
    monkeypatch.setattr(product_stage, "variants", lambda operator: {"eager": {}})
    entries = {(e.matrix, e.variant): e for e in product_stage.compiled_entries()}
    with pytest.raises(NotImplementedError, match="GGNOperator has no keyword cuda_graphs"):
        entries[GGN, "cuda_graphs"].build(None)


@pytest.mark.parametrize(
    ("name", "n"),
    [("mlp", 85_002), ("resnet18", 11_173_962), ("gpt2", 124_439_808), ("smollm2", 134_515_008)],
)
def test_workloads_have_as_many_parameters_as_their_models(name, n):
    if name in ("gpt2", "smollm2"):
        pytest.importorskip("transformers")
    with torch.device("meta"):
        assert WORKLOADS[name](torch.device("meta"), False).size == n


def test_bandwidth_is_that_of_the_least_traffic():
    # 3 logit-sized tensors of 8 bytes and 1 of weights in 5 s; 2 copied in 4 s.
    found = bandwidths([5.0, 5.0], [4.0, 4.0], size=8, of_weights=1)
    assert (found["bytes_per_second"], found["copy_bytes_per_second"]) == (5, 4)
    assert found["fraction_of_copy"] == 5 / 4


def test_bytes_over_the_bus_are_those_of_copies_between_host_and_device():
    def event(name, size, cat="gpu_memcpy"):
        return {"name": name, "cat": cat, "args": {"bytes": size}}

    trace = {
        "traceEvents": [
            event("Memcpy HtoD (Pinned -> Device)", 40),
            event("Memcpy DtoH (Device -> Pinned)", 8),
            event("Memcpy DtoD (Device -> Device)", 1000),
            event("Memcpy HtoD (Pageable -> Device)", 2),
            event("cudaMemcpyAsync", 7, "cuda_runtime"),
            {"name": "process_name"},
        ]
    }
    assert copied_bytes(trace) == {"HtoD": 42, "DtoH": 8}


@pytest.mark.parametrize("name", [LANCZOS, SCIPY])
def test_ways_find_the_largest_eigenpairs(name):
    values = torch.tensor([9.0, 7.0, 5.0, *np.linspace(1, 2, 37)], dtype=torch.float64)
    op = MatrixOperator(torch.diag(values))
    request = type("Request", (), {"k": 2, "start": op.space.random(1)[:, 0], "scale": 7.0})
    found, X = WAYS[name](op, request)
    np.testing.assert_allclose(np.sort(found), [7.0, 9.0], rtol=1e-4)
    assert float((values[:, None] * X - X * found).norm()) < 1e-2


def product(matrix, candidate, gradients, workload="mlp", *, columns=1, variant="eager"):
    facts = {"title": "an MLP", "parameters": 10, "peak_bytes": None, "error": 0.0}
    return {
        "section": "products" if variant == "eager" else "compiled products",
        **{"workload": workload, "matrix": matrix, "candidate": candidate, "variant": variant},
        **{"columns": columns, "gradients": gradients, **facts},
        **{"gradient_seconds": [1.0], "seconds_per_vector": [gradients]},
    }


def solved(way, seconds, accurate=True, moved=0):
    return {
        "section": "eigsh",
        **{"workload": "mlp", "title": "an MLP", "parameters": 10, "way": way},
        **{"seconds": [seconds], "accurate": accurate, "residual": 1e-5, "products": 50},
        **{"bus_bytes": {"HtoD": moved, "DtoH": moved}, "peak_bytes": None},
    }


GOOD = [
    {"section": "tests", "test": "t", "outcome": "passed", "reason": ""},
    product(HESSIAN, OURS, 2.0),
    product(HESSIAN, OURS, 1.0, columns=8),
    product(HESSIAN, HE, 4.0),
    product(HESSIAN, CL, 6.0),
    product(GGN, OURS, 1.5),
    product(HESSIAN, OURS, 1.4, variant="compile"),
    product(HESSIAN, OURS, 1.7, variant="cuda_graphs"),
    {
        **{"section": "cross-entropy", "title": "rows", "dtype": "float32", "backend": "triton"},
        **{"fraction_of_copy": 0.9, "bytes_per_second": 9e11, "copy_bytes_per_second": 1e12},
        "error": 1e-6,
    },
    solved(LANCZOS, 1.0),
    solved(CUPYX, 1.1, moved=4),
]


def judged(records):
    return {c["text"]: c["holds"] for c in document(records, {}, rehearsal=False)["claims"]}


def test_all_claims_hold_where_all_targets_are_met():
    assert set(judged(GOOD).values()) == {True}


# Each makes one claim fail; its first words.
BAD = [
    ({"section": "tests", "test": "t", "outcome": "failed", "reason": "no"}, "tests marked gpu"),
    (product(HESSIAN, OURS, 2.3, "gpt2"), "gradients a Hessian product takes, eager"),
    (
        product(HESSIAN, OURS, 1.6, "resnet18", variant="compile"),
        "gradients a Hessian product takes, compiled",
    ),
    (product(GGN, OURS, 1.7, "gpt2"), "gradients a GGN"),
    (product(HESSIAN, HE, 2.9), "times as fast as the faster peer"),
    (product(GGN, OURS, 1.6, columns=8), "time per vector of a block"),
    (GOOD[8] | {"fraction_of_copy": 0.79, "dtype": "bfloat16"}, "bandwidth"),
    (solved(CUPYX, 0.9, moved=4), "time of lanczos"),
    (solved(CUPYX, 1.1, moved=21), "vectors that eigsh of cupyx moves"),
]


@pytest.mark.parametrize(("record", "words"), BAD, ids=[words for _, words in BAD])
def test_claim_fails_by_itself(record, words):
    failing = [claim for claim, holds in judged([*GOOD, record]).items() if holds is False]
    assert len(failing) == 1
    assert failing[0].startswith(words)


def test_nothing_is_claimed_of_what_was_skipped_or_too_coarse():
    records = [
        {"section": "tests", "test": "t", "outcome": "skipped", "reason": "needs a CUDA device"},
        solved(LANCZOS, 9.0),
        solved(CUPYX, 1.0, accurate=False),
    ]
    assert judged(records)["tests marked gpu that fail"] is None
    assert judged(records)["time of lanczos, in that of eigsh of cupyx, equally accurate"] is None
    assert set(judged([]).values()) == {None}


def test_a_rehearsal_judges_no_claim_and_says_so():
    found = document(GOOD, {"device": "none"}, rehearsal=True)
    assert {c["holds"] for c in found["claims"]} == {None}
    assert "its numbers mean nothing" in text(found)
    assert "holds:" not in text(found)


def test_report_names_what_failed_and_why():
    records = [
        *GOOD,
        {"section": "products", "workload": "gpt2", "failure": "not installed (transformers)"},
        {"section": "tests", "test": "test_x", "outcome": "failed", "reason": "AssertionError"},
        ending("eigsh:mlp", "stopped", "it took too long"),
    ]
    page = text(document(records, {"device": "none"}, rehearsal=False))
    assert "- products: gpt2: not installed (transformers)" in page
    assert "- failed: test_x: AssertionError" in page
    assert "- eigsh:mlp: stopped, it took too long" in page
    assert "- FAILS: tests marked gpu that fail: at most 0 (tests/gpu 1)" in page


def test_at_least_and_at_most_include_the_limit():
    assert Claim("", "at most", 2.0, {"a": 2.0}).holds
    assert Claim("", "at least", 2.0, {"a": 2.0}).holds
    assert claims({})[0].holds is None


OUTCOMES = """
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.mark.skip(reason="because")
def test_skipped(): pass
@pytest.mark.xfail(reason="known")
def test_known(): assert False
@pytest.fixture
def broken(): raise ValueError("no fixture")
def test_broken(broken): pass
"""


def test_outcome_of_every_test_is_written_once_with_its_reason(tmp_path):
    (tmp_path / "test_some.py").write_text(OUTCOMES)
    (tmp_path / "test_unreadable.py").write_text("raise ImportError('no module')")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "torchlinop.bench.outcomes", "."]
    environment = gpu_tests.environment(tmp_path / "records")
    subprocess.run(
        [*command, "--continue-on-collection-errors"],
        cwd=tmp_path, env=environment, capture_output=True, check=False,
    )  # fmt: skip
    found = read(tmp_path / "records")
    assert {r["test"].rpartition("::")[2]: (r["outcome"], r["reason"]) for r in found} == {
        "test_unreadable.py": ("error", "E   ImportError: no module"),
        "test_good": ("passed", ""),
        "test_bad": ("failed", found[2]["reason"]),
        "test_skipped": ("skipped", "Skipped: because"),
        "test_known": ("xfailed", "known"),
        "test_broken": ("error", found[5]["reason"]),
    }
    assert "AssertionError" in found[2]["reason"]
    assert "ValueError" in found[5]["reason"]


def test_slow_tests_come_last_and_others_stay_in_order():
    names = ["a::one[compile]", "a::both_of", "b::two[3-both]", "b::sanitizer", "c::four"]
    items = [SimpleNamespace(nodeid=name) for name in names]
    outcomes.pytest_collection_modifyitems(items)
    assert [names.index(item.nodeid) for item in items] == [1, 4, 0, 2, 3]


def test_compiled_entries_begin_with_what_starts_fast():
    order = [e.variant for e in product_stage.compiled_entries()]
    assert order == sorted(order, key=["eager", "cuda_graphs", "compile"].index)


def test_solver_that_takes_all_the_time_leaves_what_the_others_found(monkeypatch):
    now = [0.0]

    def slow(op, request):
        now[0] = 100.0
        return WAYS[LANCZOS](op, request)

    monkeypatch.setitem(WAYS, SCIPY, slow)
    setting = Setting(CPU, True, Clock(50.0, lambda: now[0]))
    found = {r["way"]: r for r in eigsh_stage.measured(setting, "mlp")}
    assert len(found[LANCZOS]["seconds"]) == 1
    assert found[LANCZOS]["accurate"]
    assert found[SCIPY]["failure"] == "the time of this stage was spent"


def test_products_that_did_not_compile_are_not_reported_as_compiled(monkeypatch, tmp_path):
    def fails(*arguments):
        raise RuntimeError("no compiler")

    def run(setting):
        V = torch.ones(2, 1)
        Compiled(lambda run: fails, ("cpu",))(traced(lambda V: 2 * V, V), V)
        yield {}

    monkeypatch.setitem(worker.STAGES, "compiled", Stage("compiled", "", 1.0, run))
    worker.work(["compiled"], CPU, True, 60.0, tmp_path / "records")
    (ended,) = read(tmp_path / "records")[1:]
    assert ended["status"] == "failed"
    assert "torch.compile failed (RuntimeError: no compiler)" in ended["reason"]


def test_every_package_of_the_checkout_knows_its_tests(monkeypatch, tmp_path):
    assert gpu_tests.missing() == ""
    monkeypatch.setattr(torchlinop, "__file__", str(tmp_path / "torchlinop" / "__init__.py"))
    assert "no checkout with tests/gpu" in gpu_tests.missing()


def test_missing_pytest_is_named(monkeypatch):
    monkeypatch.setattr(gpu_tests.importlib.util, "find_spec", lambda name: None)
    assert gpu_tests.missing() == "skipped: pytest is not installed"


def test_stages_are_named_once():
    assert len(gpu_stages.STAGES) == len(gpu_stages._STAGES)
    assert json.dumps(list(gpu_stages.STAGES))


class Event:
    """Of a pretended device: two marks are 30 ms apart."""

    marks: ClassVar[list] = []

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.marks.append(self)

    def synchronize(self):
        """Nothing to wait for."""

    def elapsed_time(self, other):
        assert Event.marks[-2:] == [self, other]
        return 30.0


def test_time_on_a_device_is_between_its_events_by_call(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    calls = []
    assert timing._seconds_of_device(calls.append, torch.ones(2), 3) == pytest.approx(0.01)
    assert len(calls) == 3


def test_peak_of_a_device_is_above_what_was_held(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 130)
    with peak_above(torch.device("cuda")) as peak:
        assert peak() == 30
    with peak_above(CPU) as peak:
        assert peak() is None


def test_run_without_copies_has_none_in_its_trace(monkeypatch):
    monkeypatch.setattr(eigsh_stage, "TRACED", (torch.profiler.ProfilerActivity.CPU,))
    op = MatrixOperator(torch.diag(torch.linspace(1, 9, 40)))
    request = eigsh_stage.Request(2, op.space.random(1)[:, 0])
    watched = Watched(op, Clock.of(60.0))
    found = eigsh_stage._bus_bytes(WAYS[LANCZOS], watched, request)
    assert found == {"HtoD": 0, "DtoH": 0}
