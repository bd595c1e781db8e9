"""Solvers as their first iterate and the step to the next, for several columns at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from torchlinop.algorithms.solve_result import Status


@dataclass(frozen=True)
class Iterate:
    """What a method knows of every column; the last axis of every tensor are the columns."""

    X: Tensor  # (n, k)
    residual_norms: Tensor  # (k,) as the recurrence believes
    targets: Tensor  # (k,) of them, where X may stay: the host looks late
    stuck: Tensor  # (k,) bool: no step is left
    doubtful: Tensor  # (k,) bool: X should be held against a product
    fallback: Tensor  # (n, k) an earlier X, to return to where X turns out worse
    flatness: Tensor  # (k,) ‖A r‖ / (‖A‖ ‖r‖) of the fallback, as the recurrence believes
    scale: Tensor  # (k,) a bound below ‖A‖
    preconditioner_fails: Tensor  # (k,) bool: r ≠ 0, but rᵀ M r ≤ 0
    curvatures: Tensor  # (k,) pᵀ A p / ‖p‖² of the last direction
    directions: Tensor  # (n, k) p


State = TypeVar("State", bound=Iterate)


@dataclass(frozen=True)
class Method(Generic[State]):
    """A solver as its first iterate and the step to the next. Steps may overwrite what they get."""

    name: str
    start: Callable[[Tensor, Tensor, Tensor, Tensor], State]  # X, its residual R, targets, scale
    step: Callable[[State], State]
    when_stuck: Status
    monotone: bool  # residuals never grow, but by rounding
    flat: float = 0.0  # flatness of a residual that counts as orthogonal to the range of A


def within(mask: Tensor, part: Tensor) -> Tensor:
    """A mask whose true entries are replaced by those of another, shorter one."""
    whole = mask.clone()
    whole[mask] = part
    return whole


def taken(state: State, columns: Tensor) -> State:
    """The state of these columns, a mask, alone."""
    index = columns.nonzero()[:, 0].to(state.X.device)
    pieces = {name: t.index_select(-1, index) for name, t in _tensors(state)}
    return dataclasses.replace(state, **pieces)


def replaced(state: State, columns: Tensor, fresh: State) -> State:
    """The state with these columns, a mask, taken from another."""
    index = columns.nonzero()[:, 0].to(state.X.device)
    others = dict(_tensors(fresh))
    pieces = {name: t.index_copy(-1, index, others[name]) for name, t in _tensors(state)}
    return dataclasses.replace(state, **pieces)


def _tensors(state: Iterate) -> list[tuple[str, Tensor]]:
    return [(field.name, getattr(state, field.name)) for field in dataclasses.fields(state)]
