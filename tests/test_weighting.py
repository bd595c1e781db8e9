"""The weight of a batch is what makes the losses of its parts add up."""

import math

import pytest
import torch
import torch.nn.functional as F

from torchlinop.errors import NonFiniteError, WeightingError
from torchlinop.weighting import find_weighting

EPS = torch.finfo(torch.float64).eps
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
    weighting = find_weighting(batches(*sizes), loss, EPS)
    assert weighting.mean == is_mean


def test_means_are_told_from_sums_on_batches_of_one_sample():
    assert find_weighting(batches(*[1] * 12), mean, EPS).unit == "samples"
    assert not find_weighting(batches(*[1] * 12), total, EPS).mean


@pytest.mark.parametrize("sizes", [(6, 6), (5, 5, 2), (1,) * 12])
def test_ignored_labels_are_found_out(sizes):
    labels = LABELS.clone()
    labels[[0, 1, 7]] = -100
    found = find_weighting(batches(*sizes, labels=labels), mean, EPS)
    assert found.unit == "unmasked labels"


def test_labels_of_minus_100_that_the_loss_counts_are_samples():
    labels = torch.where(LABELS == 0, -100, LABELS)

    def loss(batch):
        return (batch[0].sum(1) * batch[1]).mean()

    assert find_weighting(batches(5, 5, 2, labels=labels), loss, EPS).unit == "samples"


def test_attention_masks_are_found_out():
    mask = (torch.arange(5) < torch.tensor([5, 2, 3, 1])[:, None]).long()
    whole = {"x": LOGITS[:4], "attention_mask": mask}
    data = [{k: v[i : i + 2] for k, v in whole.items()} for i in (0, 2)]

    def loss(batch):
        return (batch["x"] * batch["attention_mask"]).sum() / batch["attention_mask"].sum()

    assert find_weighting(data, loss, EPS).unit == "attended tokens"


def test_a_regulariser_does_not_matter():
    assert find_weighting(batches(5, 5, 2), lambda b: mean(b) + 7.0, EPS).unit == "samples"


def test_one_batch_needs_no_evaluation_of_the_loss():
    assert find_weighting(batches(12), None, EPS).mean


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
        find_weighting(batches(5, 5, 2), loss, EPS)


def test_batches_that_cannot_be_counted_are_refused():
    with pytest.raises(WeightingError, match="their samples cannot be counted"):
        find_weighting(["a", "b"], mean, EPS)


def test_single_sequences_that_cannot_be_joined_are_refused_when_rules_differ():
    rows = [{"labels": torch.tensor([[1, 2, 3, -100]])}, {"labels": torch.tensor([[1, 2]])}]
    with pytest.raises(WeightingError, match="no two of them can be joined"):
        find_weighting(rows, None, EPS)


def test_a_loss_that_is_not_finite_is_refused():
    with pytest.raises(NonFiniteError, match="samples is nan; clean the data"):
        find_weighting(batches(6, 6), lambda b: torch.tensor(math.nan), EPS)
