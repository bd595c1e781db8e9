"""Which parameters belong to one block: a parameter, a module, or what a function says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torchlinop.errors import OptionError
from torchlinop.parameters import ParameterLayout, Slot
from torchlinop.signatures import takes

# "parameter": a block each; "module": the name before its last dot; or (name, slot) -> label.
Grouping = Literal["parameter", "module"] | Callable[[str, Slot], str]


def _module(name: str, slot: Slot) -> str:
    return name.rpartition(".")[0] or "(root)"


_GROUPINGS: dict[str, Callable[[str, Slot], str]] = {
    "parameter": lambda name, slot: name,
    "module": _module,
}


def grouped(layout: ParameterLayout, by: Grouping) -> dict[str, tuple[Slot, ...]]:
    """The slots of every label, labels in the order of the layout; those without entries are none.

    Raises:
        OptionError: ``by`` is none of the choices, or gives a label that is no string.
    """
    label_of = _GROUPINGS.get(by) if isinstance(by, str) else by
    if not (callable(label_of) and takes(label_of, 2)):
        raise OptionError(
            f"unknown grouping by={by!r}; choose one of {', '.join(_GROUPINGS)}, "
            "or a function (name, slot) -> label"
        )
    groups: dict[str, tuple[Slot, ...]] = {}
    for slot in (slot for slot in layout.slots if slot.numel):
        label = label_of(slot.name, slot)
        if not isinstance(label, str):
            raise OptionError(
                f"expected by(name, slot) to return a label, a string, got {label!r} for "
                f'{slot.name!r}; return "others", say'
            )
        groups[label] = (*groups.get(label, ()), slot)
    return groups
