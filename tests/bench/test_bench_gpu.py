"""``python -m torchlinop.bench gpu`` rehearsed on a CPU: what it writes, and what it refuses."""

import json
import os
import statistics
import subprocess
import sys

import pytest
import torch

from torchlinop.bench.__main__ import main
from torchlinop.bench.gpu_report import UNITS
from torchlinop.bench.gpu_stages import STAGES

CHOSEN = ["products:mlp", "cross-entropy:bandwidth", "eigsh:mlp", "compiled products:mlp"]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The document and the page of a run of some stages."""
    out = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "torchlinop.bench", "gpu", "--out", str(out)]
    rehearsal = ["--device", "cpu", "--tiny", "--only", "tests", *CHOSEN]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(
        [*command, *rehearsal], env=environment, capture_output=True, text=True, check=False
    )
    log = (out / "gpu.log").read_text() if (out / "gpu.log").exists() else ""
    assert ran.returncode == 0, ran.stderr + log
    return json.loads((out / "gpu.json").read_text()), ran.stdout


def records(rehearsed, section):
    return [r for r in rehearsed[0]["sections"][section] if "failure" not in r]


def test_every_stage_is_done(rehearsed):
    ended = {stage["name"]: stage["status"] for stage in rehearsed[0]["stages"]}
    assert ended == dict.fromkeys(["tests", *CHOSEN], "done")


def test_document_says_what_it_is_and_where_it_ran(rehearsed):
    found = rehearsed[0]
    assert found["rehearsal"] is True
    assert found["facts"]["torch"] == torch.__version__
    assert {"date", "device", "python", "numpy", "scipy", "torchlinop"} <= set(found["facts"])


def test_every_number_with_a_unit_has_one_that_is_listed(rehearsed):
    measured = [r for rows in rehearsed[0]["sections"].values() for r in rows]
    suffixes = ("seconds", "bytes", "per_second", "per_vector")
    named = {key for r in measured for key in r if key.endswith(suffixes)}
    assert named - {"minimal_bytes", "copy_bytes", "copy_seconds"} <= set(UNITS)
    assert rehearsed[0]["units"] == UNITS


def test_tests_without_a_device_are_skipped_and_none_is_broken(rehearsed):
    assert {r["outcome"] for r in rehearsed[0]["sections"]["tests"]} == {"skipped"}
    assert all("CUDA" in r["reason"] for r in rehearsed[0]["sections"]["tests"])


def test_prices_are_medians_of_interleaved_ratios(rehearsed):
    rows = records(rehearsed, "products")
    assert {(r["matrix"], r["columns"]) for r in rows} >= {("hessian", 1), ("hessian", 8)}
    for r in rows:
        pairs = zip(r["seconds_per_vector"], r["gradient_seconds"], strict=True)
        assert r["gradients"] == pytest.approx(statistics.median(p / g for p, g in pairs))
        assert min(r["seconds_per_vector"]) > 0


def test_candidates_multiply_by_the_same_matrix(rehearsed):
    errors = {r["candidate"]: r["error"] for r in records(rehearsed, "products")}
    errors.pop("hessian-eigenthings", None)  # its GGN is a finite difference
    assert max(errors.values()) < 1e-4


def test_solvers_are_as_accurate_as_asked(rehearsed):
    rows = records(rehearsed, "eigsh")
    assert len(rows) == 2
    for r in rows:
        assert r["accurate"] == (r["residual"] <= 2 * r["tolerance"])
        assert r["accurate"]
        assert r["products"] > 0
        assert r["bus_bytes"] is None  # nothing was traced


def test_bandwidth_is_bytes_over_seconds(rehearsed):
    for r in records(rehearsed, "cross-entropy"):
        median = statistics.median(r["seconds"])
        assert r["bytes_per_second"] == pytest.approx(r["minimal_bytes"] / median)
        assert r["error"] < {"float32": 1e-5, "bfloat16": 1e-2}[r["dtype"]]


def test_what_needs_a_device_is_named_as_not_measured(rehearsed):
    compiled = rehearsed[0]["sections"]["compiled products"]
    ours = [r for r in compiled if r["candidate"].startswith("torchlinop")]
    failures = {r["failure"] for r in ours if r["variant"] != "eager"}
    assert failures == {"not measured: needs a CUDA device"}
    assert "eigsh of cupyx, in place: not measured: needs a CUDA device" in rehearsed[1]


def test_claims_are_listed_with_what_was_found_and_none_is_judged(rehearsed):
    found = rehearsed[0]["claims"]
    assert {claim["holds"] for claim in found} == {None}
    eager = next(c for c in found if c["text"] == "gradients a Hessian product takes, eager")
    single = [
        r
        for r in records(rehearsed, "products")
        if (r["matrix"], r["candidate"], r["columns"]) == ("hessian", "torchlinop, kept", 1)
    ]
    assert eager["found"] == {"mlp": single[0]["gradients"]}
    assert (eager["bound"], eager["limit"]) == ("at most", 2.2)


def test_page_begins_with_the_warning_and_ends_with_the_stages(rehearsed):
    page = rehearsed[1]
    assert page.startswith("# torchlinop on a GPU\n\n**A rehearsal with tiny models")
    assert "| products:mlp | done |" in page
    assert "not judged: gradients a Hessian product takes, eager: at most 2.2" in page


REFUSED = [
    (["--device", "cpu"], "expected --tiny with --device cpu: the models are meant for a GPU"),
    (["--device", "meta"], "expected --device cuda or cpu, got meta"),
    (["--device", "cpu", "--tiny", "--minutes", "0"], "expected --minutes to be positive, got 0"),
    (["--only", "everything"], "invalid choice: 'everything'"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_request_that_makes_no_sense_is_refused_before_anything_is_written(
    tmp_path, capsys, monkeypatch, options, message
):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as stopped:
        main(["gpu", "--out", str(tmp_path / "out"), *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_device_is_named_with_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["gpu", "--out", str(tmp_path / "out")])
    message = capsys.readouterr().err
    assert "expected a CUDA device, but torch" in message
    assert "rehearse with --device cpu --tiny" in message


def test_stages_cover_the_workloads_both_ways():
    names = set(STAGES)
    for workload in ("mlp", "resnet18", "gpt2", "smollm2"):
        assert {f"products:{workload}", f"compiled products:{workload}"} <= names
