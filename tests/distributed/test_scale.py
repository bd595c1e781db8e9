"""What is counted of products and Lanczos steps on several ranks, and the page that tells it."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import on_ranks

from torchlinop.bench import paper_model
from torchlinop.bench.collectives import Collectives
from torchlinop.bench.host_memory import host_peak
from torchlinop.bench.scale import _STEPS, BATCHES, COLUMNS, SETUPS, measured, report

ROOT = Path(__file__).parents[2]


def counted():
    with Collectives() as seen:
        ones = torch.ones(3)
        dist.all_reduce(ones)
        dist.broadcast(ones, 0)
        dist.all_gather([torch.empty(3) for _ in range(dist.get_world_size())], ones)
        torch.ones(5) + 1
    return seen.seen, seen.count, seen.bytes


def test_collectives_are_counted_with_their_bytes():
    expected = [("all-reduce", 12), ("broadcast", 12), ("all-gather", 12)]
    assert on_ranks(2, counted) == [(expected, 3, 36)] * 2


def test_the_peak_of_the_host_is_what_was_held_at_once():
    kept = []

    def work():
        a = torch.ones(1000)
        b = a + 1
        del a
        kept.append(b + 1)

    assert 8000 <= host_peak(work) <= 9000


def of_both():
    return [measured(setup) for setup in SETUPS]


@cache
def records():
    return on_ranks(2, of_both, timeout=300)


def test_a_product_of_ddp_is_one_all_reduce_and_a_step_adds_nothing():
    ddp = records()[0][0]
    n = ddp["parameters"]
    assert ddp["product"]["all-reduce"] == [1, 4 * (n + 34)]
    assert ddp["block"]["all-reduce"] == [1, 4 * (COLUMNS * n + 34)]
    assert ddp["product"]["all-gather"] == [0, 0]
    assert ddp["step"] == {}


def test_a_product_of_fsdp_gathers_parameters_and_tangents_and_scatters_once():
    fsdp = records()[1][1]
    n = fsdp["parameters"]
    assert fsdp["product"]["all-gather"][1] == pytest.approx(4 * BATCHES * 4 * n, rel=0.01)
    assert fsdp["product"]["reduce-scatter"][1] == pytest.approx(BATCHES * 4 * n, rel=0.01)
    assert fsdp["vector_bytes"] == pytest.approx(2 * n, rel=0.01)


def test_a_lanczos_step_of_fsdp_is_two_small_all_reduces_besides_its_product():
    for fsdp in [record for record in records()[0] if record["setup"] == "FSDP2"]:
        assert list(fsdp["step"]) == ["all-reduce"]
        number, size = fsdp["step"]["all-reduce"]
        assert number <= 2
        assert size <= 8 * 2 * max(_STEPS)


def test_the_report_has_a_row_for_every_record():
    text = report(records()[0], "2")
    assert text.count("| 2 | DDP |") == 2
    assert text.count("| 2 | FSDP2 |") == 2


def test_the_committed_report_is_that_of_the_committed_records():
    folder = ROOT / "docs" / "benchmarks" / "scale"
    facts = json.loads((folder / "scale.json").read_text())
    assert (folder / "scale.md").read_text() == report(facts["records"], facts["torch"])
    assert {record["world_size"] for record in facts["records"]} == {1, 2, 4}


def test_the_page_on_a_hundred_billion_parameters_is_what_the_model_computes():
    assert (ROOT / "docs" / "hundred_billion.md").read_text() == paper_model.page()


def test_a_gradient_of_a_hundred_billion_parameters_takes_its_operations_over_their_rate():
    seconds = paper_model.GRADIENT_BF16.seconds
    assert seconds == pytest.approx(8 * 1e11 * 2**20 / (64 * 0.4 * 989e12), rel=0.02)


def test_memory_that_is_too_small_is_said_to_be():
    small = paper_model.memory(paper_model.DIFFERENCES_FP32, paper_model.TWO_VECTORS)
    large = paper_model.memory(paper_model.DIFFERENCES_FP32, paper_model.Basis("", 20, 4))
    assert sum(small.values()) < 80e9 < sum(large.values())
