"""The objective over the data of all processes, from the objective that each has over its own."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from torchlinop.batches import Batch, detached_copy, to_device
from torchlinop.data import NOTHING, telling
from torchlinop.errors import ProcessGroupError, WeightingError
from torchlinop.fingerprint import fingerprint
from torchlinop.objective import Objective
from torchlinop.ranks import Ranks
from torchlinop.weighting import Weighting
from torchlinop.weighting_trials import explaining, head, unknown_weights

AnyObjective = TypeVar("AnyObjective", bound=Objective)

_CPU = torch.device("cpu")


def united(objective: AnyObjective, ranks: Ranks) -> AnyObjective:
    """``Σ_r Σ_b w_rb L_rb(θ) / Σ_r Σ_b w_rb``: the batches of all ranks, one rank after the other.

    The mean is that of a single process with all batches: weights are found on batches of all
    ranks, the numbers of samples and batches (of draws and dropout masks) go on from rank to rank.
    Costs the forward passes of ``find_weighting``, if the weights are measured.

    Raises:
        ProcessGroupError: the ranks have different models, parameters, buffers or modes.
        WeightingError: the weights of the ranks are unknown, or contradict each other.
        EmptyDataError: a rank has no loss term.
    """
    if objective.ranks == ranks:
        return objective
    with ranks.agreed():
        mine = _Facts.of(objective)
    _refuse_other_models(ranks.gathered(mine))
    weighting = _common_weighting(objective, ranks)
    data = objective.data
    with ranks.agreed():
        data = data if weighting == data.weighting else data.weighed(weighting)
    owns = ranks.gathered(data.own)
    before, whole = sum(owns[: ranks.number], NOTHING), sum(owns, NOTHING)
    return replace(
        objective,
        data=data.among(before, whole),
        ranks=ranks,
        space=ranks.space(objective.space, sums=True),
    )


@dataclass(frozen=True)
class _Facts:
    """What has to be the same on all ranks."""

    model: str
    mode: str
    seed: int
    forms: dict[str, str]  # of parameters and buffers
    values: dict[str, int]  # their fingerprints

    @classmethod
    def of(cls, objective: Objective) -> _Facts:
        model = objective.model
        tensors = {**model.held(), **objective.layout.split(objective.theta)}
        values = torch.stack([fingerprint(t.detach()) for t in tensors.values()]).tolist()
        forms = {name: f"{tuple(t.shape)} {t.dtype}" for name, t in tensors.items()}
        kind = type(model.module).__name__
        return cls(kind, model.mode, model.seed, forms, dict(zip(tensors, values, strict=True)))


def _refuse_other_models(of_ranks: Sequence[_Facts]) -> None:
    first = of_ranks[0]
    for rank, facts in enumerate(of_ranks):
        for what, here, there in [
            ("model", first.model, facts.model),
            ("mode", repr(first.mode), repr(facts.mode)),
            ("seed", first.seed, facts.seed),
            *_differences("a parameter or buffer", first.forms, facts.forms),
        ]:
            if here != there:
                raise ProcessGroupError(
                    f"the ranks differ in {what}: {here} on rank 0, {there} on rank {rank}; "
                    "build the same model, and the operator with the same options, on every rank"
                )
        names = [name for name, value in first.values.items() if facts.values[name] != value]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ProcessGroupError(
                f"the ranks hold different values of {names[0]}{more} (ranks 0 and {rank}); wrap "
                "the model in DistributedDataParallel, or broadcast parameters and buffers from "
                "rank 0 (torch.distributed.broadcast), before the operator is built"
            )


def _differences(
    what: str, here: dict[str, str], there: dict[str, str]
) -> list[tuple[str, str, str]]:
    names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    return [
        (f"{what}, {name}", here.get(name, "none"), there.get(name, "none")) for name in names[:1]
    ]


def _common_weighting(objective: Objective, ranks: Ranks) -> Weighting:
    """The rule that weighs the batches of all ranks.

    Raises:
        WeightingError: there is none.
    """
    own = objective.data.weighting
    rules = ranks.gathered((own.measured, own.unit, own.mean))
    if all(measured for measured, _, _ in rules):
        return _measured_weighting(objective, ranks)
    if len(set(rules)) > 1:
        units = " and ".join(sorted({unit if mean else "a sum" for _, unit, mean in rules}))
        raise WeightingError(
            f"the ranks weigh their batches differently, by {units}; pass the same loss, and the "
            "same weight= or weighting=, on every rank"
        )
    return own


def _measured_weighting(objective: Objective, ranks: Ranks) -> Weighting:
    """Found on a few samples of all ranks; for all data, rules that pass must weigh alike."""
    data, device = objective.data, objective.space.device

    def evaluate(batch: Batch) -> Tensor:
        model = objective.model
        with model.borrowed(mode="eval"), torch.no_grad():
            return objective.value(objective.layout.split(objective.theta), batch)

    with ranks.agreed():
        few = [head(batch) for batch in telling(data.everything(), 1, 1)]
        sent = pickle.dumps([to_device(detached_copy(batch), _CPU) for batch in few])
    of_ranks = ranks.gathered(sent)
    with ranks.agreed():
        seen = telling(
            to_device(batch, device) for some in of_ranks for batch in pickle.loads(some)
        )
        rules = explaining(seen, evaluate) if len(seen) > 1 else [data.weighting]
        rows = [[rule.count(batch) for rule in rules] for batch in data.everything()]
        counts = torch.tensor(rows, dtype=torch.float64)
    total = torch.stack(ranks.gathered(counts.sum(0))).sum(0)
    with ranks.agreed():
        shares = counts / total
        if not torch.allclose(shares, shares[:, :1], rtol=1e-9, atol=0):
            units = ", ".join(rule.unit for rule in rules)
            raise WeightingError(
                unknown_weights(seen, f"{units} all explain the loss of their parts")
            )
    return replace(rules[0], measured=True)
