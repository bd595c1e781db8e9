"""The weight of a batch is what makes the losses of its parts add up."""

import math

import pytest
import torch
import torch.nn.functional as F

from torchlinop.errors import NonFiniteError, WeightingError
from torchlinop.weighting_trials import find_weighting

LOGITS = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).double()
LABELS = torch.arange(12) % 5


def batches(*sizes, labels=LABELS):
    return list(zip(LOGITS.split(list(sizes)), labels.split(list(sizes)), strict=True))


def mean(batch):
    return F.cross_entropy(*batch)


def total(batch):
    return F.cross_entropy(*batch, reduction="sum")


@pytest.mark.parametrize("sizes", [(6, 6), (5, 5, 2), (11, 1)])
@pytest.mark.parametrize(("loss", "is_mean"), [(mean, True), (total, False)])
def test_means_are_told_from_sums(loss, is_mean, sizes):
    weighting = find_weighting(batches(*sizes), loss)
    assert weighting.mean == is_mean


def test_means_are_told_from_sums_on_batches_of_one_sample():
    assert find_weighting(batches(*[1] * 12), mean).unit == "samples"
    assert not find_weighting(batches(*[1] * 12), total).mean


@pytest.mark.parametrize("sizes", [(6, 6), (5, 5, 2), (1,) * 12])
def test_ignored_labels_are_found_out(sizes):
    labels = LABELS.clone()
    labels[[0, 1, 7]] = -100
    found = find_weighting(batches(*sizes, labels=labels), mean)
    assert found.unit == "unmasked labels"


def test_labels_of_minus_100_that_the_loss_counts_are_samples():
    labels = torch.where(LABELS == 0, -100, LABELS)

    def loss(batch):
        return (batch[0].sum(1) * batch[1]).mean()

    assert find_weighting(batches(5, 5, 2, labels=labels), loss).unit == "samples"


def test_attention_masks_are_found_out():
    mask = (torch.arange(5) < torch.tensor([5, 2, 3, 1])[:, None]).long()
    whole = {"x": LOGITS[:4], "attention_mask": mask}
    data = [{k: v[i : i + 2] for k, v in whole.items()} for i in (0, 2)]

    def loss(batch):
        return (batch["x"] * batch["attention_mask"]).sum() / batch["attention_mask"].sum()

    assert find_weighting(data, loss).unit == "attended tokens"


def test_a_regulariser_does_not_matter():
    assert find_weighting(batches(5, 5, 2), lambda b: mean(b) + 7.0).unit == "samples"


def test_one_batch_needs_no_evaluation_of_the_loss():
    assert find_weighting(batches(12), None).mean


@pytest.mark.parametrize(
    "loss",
    [
        lambda b: F.cross_entropy(*b, weight=torch.arange(1, 6).double()),
        lambda b: (b[0] - b[0].mean(0)).pow(2).mean(),
        lambda b: mean(b).sqrt(),
    ],
    ids=["class weights", "coupled samples", "root of a mean"],
)
def test_losses_that_no_count_explains_are_refused(loss):
    with pytest.raises(
        WeightingError, match=r"have 5, 5, 2 samples.*no count explains.*batch-mean"
    ):
        find_weighting(batches(5, 5, 2), loss)


def test_batches_that_cannot_be_counted_are_refused():
    with pytest.raises(WeightingError, match="their samples cannot be counted"):
        find_weighting(["a", "b"], mean)


def test_single_sequences_that_cannot_be_joined_are_refused_when_rules_differ():
    rows = [{"labels": torch.tensor([[1, 2, 3, -100]])}, {"labels": torch.tensor([[1, 2]])}]
    with pytest.raises(WeightingError, match=r"samples, unmasked labels, .* sum all explain"):
        find_weighting(rows, lambda b: torch.tensor(1.0))


def test_class_weights_on_sorted_data_are_refused_though_every_batch_looks_like_a_mean():
    weight = torch.tensor([1.0, 2, 10]).double()
    logits = LOGITS[:, :3]
    data = list(zip(logits.split(4), (torch.arange(12) // 4).split(4), strict=True))
    with pytest.raises(WeightingError, match="no count explains"):
        find_weighting(data, lambda b: F.cross_entropy(*b, weight=weight))


def test_masks_that_begin_in_a_later_batch_are_found_out():
    labels = LABELS.clone()
    labels[[7, 9, 11]] = -100
    data = [{"x": x, "y": y} for x, y in batches(6, 6, labels=labels)]
    found = find_weighting(data, lambda b: F.cross_entropy(b["x"], b["y"]))
    assert found.unit == "unmasked labels"


def test_masks_where_no_rule_looks_for_them_are_refused():
    labels = LABELS.clone()
    labels[[7, 9, 11]] = -100
    data = [(x, y, torch.arange(6)) for x, y in batches(6, 6, labels=labels)]
    with pytest.raises(WeightingError, match="no count explains"):
        find_weighting(data, lambda b: F.cross_entropy(b[0], b[1]))


def test_losses_that_tell_no_rule_from_another_are_refused():
    labels = LABELS.clone()
    labels[[1, 7]] = -100
    constant = [(torch.zeros_like(x), y) for x, y in batches(5, 5, 2, labels=labels)]
    with pytest.raises(WeightingError, match="samples, unmasked labels all explain"):
        find_weighting(constant, mean)


def test_a_loss_that_fails_on_parts_of_a_batch_is_refused_with_its_reason():
    def whole_only(batch):
        if len(batch[1]) != 6:
            raise IndexError("index 5 is out of bounds")
        return mean(batch)

    with pytest.raises(WeightingError, match=r"part of a batch failed \(index 5 is out of bounds"):
        find_weighting(batches(6, 6), whole_only)


def test_a_loss_that_fails_on_its_own_raises_its_own_error():
    with pytest.raises(ZeroDivisionError):
        find_weighting(batches(6, 6), lambda b: 1 / 0)


def test_a_loss_that_is_not_finite_is_refused():
    with pytest.raises(NonFiniteError, match="samples is nan; clean the data"):
        find_weighting(batches(6, 6), lambda b: torch.tensor(math.nan))


def test_half_precision_tells_counts_apart_by_the_noise_it_measures():
    labels = LABELS.clone()
    labels[[0, 1, 7]] = -100
    coarse = [(x.bfloat16(), y) for x, y in batches(5, 5, 2, labels=labels)]
    found = find_weighting(coarse, lambda b: F.cross_entropy(b[0].float(), b[1]))
    assert found.unit == "unmasked labels"


def test_kernels_that_round_by_batch_size_do_not_hide_the_count():
    def rounded(batch):
        return mean(batch) * (1 + 1e-4 * (len(batch[1]) % 3))

    assert find_weighting(batches(5, 5, 2), rounded).unit == "samples"
    assert not find_weighting(batches(5, 5, 2), lambda b: len(b[1]) * rounded(b)).mean
