"""Is this a fixed, finite, symmetric matrix, and of what? Looked at before any long run."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchlinop.articles import kind_of
from torchlinop.batches import Batch, count_samples, is_one_batch, read, tensors
from torchlinop.command_line.curvature import Parts
from torchlinop.command_line.findings import Finding, Level, examining
from torchlinop.dtypes import name_of
from torchlinop.model_state import unwrap
from torchlinop.operators.base import CurvatureOperator
from torchlinop.operators.check import CheckReport
from torchlinop.operators.of_objective import ObjectiveOperator
from torchlinop.random_state import preserved_random_state, reseed

_CPU = torch.device("cpu")


def of_model(model: nn.Module) -> Iterator[Finding]:
    """Wrappers, dtypes, numbers that are not finite."""
    module = unwrap(model)
    parameters = dict(module.named_parameters())
    kinds = sorted({name_of(p.dtype) for p in parameters.values()})
    entries = sum(p.numel() for p in parameters.values())
    text = f"{type(module).__name__}: {len(parameters)} parameters, {entries:,} entries"
    yield Finding("ok", "model", f"{text} in {', '.join(kinds)}")
    if module is not model:
        name = type(model).__name__
        yield Finding("note", "model", f"differentiated through the module inside of {name}")
    if len(kinds) > 1:
        yield Finding("note", "model", "vectors have the widest dtype, products the coarsest's")
    for name, p in parameters.items():
        bad = _not_finite(p)
        if bad:
            yield Finding("FAULT", "model", f"parameter {name} holds {bad} NaN or infinite entries")


def of_data(parts: Parts) -> Iterator[Finding]:
    """Sizes, numbers that are not finite, and whether two passes give the same. Reads twice."""
    data = parts.data
    if isinstance(data, Iterator):
        kept = parts.options.get("pin_data", True)
        says = "is empty after one pass, which is kept" if kept else "can be read once only"
        yield Finding("note", "data", f"{kind_of(data)} {says}")
        return
    fixed = isinstance(data, list | tuple) or is_one_batch(data)
    first = _Pass(data, 0)
    yield from first.findings
    if not fixed:
        yield from _differences(data, first, _Pass(data, 1))


class _Pass:
    """One pass over the data: sizes of batches, and a number for every sample."""

    def __init__(self, data: Iterable[Batch], seed: int) -> None:
        self.sizes: list[int] = []
        self.samples: list[float] = []
        self.findings: list[Finding] = []
        with preserved_random_state(_CPU):
            reseed(seed, _CPU)
            for b, batch in enumerate(read(data, None, _CPU)):
                self._note(b, batch)
        if self.sizes:
            self.findings.insert(0, Finding("ok", "data", _sizes(self.sizes)))

    def _note(self, b: int, batch: Batch) -> None:
        size = count_samples(batch) or 0
        self.sizes.append(size)
        counted = [t for t in tensors(batch) if t.ndim and len(t) == size]
        self.samples += sum((_number(t) for t in counted), torch.zeros(size)).tolist()
        for i, tensor in enumerate(tensors(batch)):
            bad = _not_finite(tensor)
            if bad:
                text = f"batch {b} holds {bad} NaN or infinite entries, in its tensor {i}"
                self.findings.append(Finding("FAULT", "data", f"{text}; clean the data"))


def _number(tensor: Tensor) -> Tensor:
    """A number for every sample (N,), which depends on all its entries."""
    rows = tensor.detach().flatten(1).double() if tensor.ndim > 1 else tensor[:, None].double()
    return rows @ torch.linspace(1, 2, rows.shape[1], dtype=torch.float64)


def _sizes(sizes: list[int]) -> str:
    if len({*sizes}) == 1:
        return f"{len(sizes)} batch{'es' if len(sizes) > 1 else ''} of {sizes[0]} samples"
    shown = [*map(str, sizes)] if len(sizes) < 6 else [*map(str, sizes[:4]), f"... {sizes[-1]}"]
    return f"{len(sizes)} uneven batches of {', '.join(shown)} samples, weighted by loss terms"


def _alike(a: list[float], b: list[float]) -> bool:
    """To rounding, which depends on the size of the batch."""
    return len(a) == len(b) and all(map(math.isclose, a, b))


def _differences(data: Any, one: _Pass, two: _Pass) -> Iterator[Finding]:
    sampler = type(getattr(data, "sampler", None)).__name__
    if one.samples == two.samples:
        yield Finding("ok", "data", "two passes give the same")
    elif _alike(sorted(one.samples), sorted(two.samples)):
        yield Finding(
            "note",
            "data",
            f"shuffled ({sampler}): two passes give the same samples in another order; one pass "
            "is kept",
        )
    else:
        dropped = getattr(data, "drop_last", False)
        cause = f"{sampler} with drop_last=True" if dropped else "random augmentation"
        yield Finding(
            "warning",
            "data",
            f"two passes give other samples ({cause}); one pass is kept, and with another --seed "
            "it is another matrix",
        )


def of_matrix(operator: CurvatureOperator, findings: list[Finding]) -> CheckReport | None:
    """Repeatability, symmetry, linearity, sign, noise, time; and whether the model is untouched."""
    findings.append(Finding("ok", "matrix", repr(operator)))
    findings.extend(Finding("note", "matrix", text) for text in operator.notes)
    if isinstance(operator, ObjectiveOperator):
        module = operator.objective.model.module
        before = {name: t.clone() for name, t in module.state_dict().items()}
        training = [m.training for m in module.modules()]
    report = None
    started = time.perf_counter()
    with examining("product", findings):
        report = operator.check()
        seconds = (time.perf_counter() - started) / 6  # that many products
        findings.extend(_defects(report))
        findings.append(Finding("note", "product", f"takes {seconds:.2g} s"))
        findings.extend(_sign(operator, report))
    if isinstance(operator, ObjectiveOperator):
        same = training == [m.training for m in module.modules()] and all(
            torch.equal(_bits(t), _bits(before[name])) for name, t in module.state_dict().items()
        )
        level: Level = "ok" if same else "FAULT"
        text = "is as it was, bit for bit" if same else "was changed by a product"
        findings.append(Finding(level, "model", text))
    return report


def _defects(report: CheckReport) -> Iterator[Finding]:
    if not report.finite:
        yield Finding("FAULT", "product", "holds NaN or infinity")
        return
    rows = (
        ("repeatable", report.repeatability, "two products with one v differ", "randomness"),
        ("symmetric", report.symmetry, "<u, A v> and <A u, v> differ", "a product that is not A"),
        ("linear", report.linearity, "A (u + v) and A u + A v differ", "a map that is not linear"),
    )
    for (name, defect, meaning, cause), bound in zip(rows, report.bounds, strict=True):
        if defect <= bound:
            yield Finding("ok", "product", f"{name}: {meaning} by {defect:.0e}")
        else:
            text = f"not {name}: {meaning} by {defect:.0e} of their size; look for {cause}"
            yield Finding("FAULT", "product", text)
    yield Finding("note", "product", f"noise {report.noise:.0e} of its norm, by rounding")


def _sign(operator: CurvatureOperator, report: CheckReport) -> Iterator[Finding]:
    """⟨v, A v⟩ of a random v, where the matrix promises that it is not negative."""
    if not (operator.positive_semidefinite and report.finite):
        return
    v = operator.space.random(1, 1)
    quotient = float(operator.space.inner(v, operator.matmat(v)).real / operator.space.norm(v) ** 2)
    if quotient >= -max(report.noise, 100 * torch.finfo(operator.dtype).eps) * report.norm:
        yield Finding("ok", "product", f"positive: <v, A v> = {quotient:.2g} for a random unit v")
    else:
        yield Finding("FAULT", "product", f"<v, A v> = {quotient:.2g}: the matrix is not positive")


def _not_finite(tensor: Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0


def _bits(tensor: Tensor) -> Tensor:
    """Its bytes, which are equal for equal NaN too."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)
