"""Options that are one of a few names."""

from __future__ import annotations

from collections.abc import Iterable

from torchlinop.errors import OptionError


def refuse_unknown(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise OptionError, which lists the choices, for a value that is not among them."""
    known = tuple(choices)
    if value not in known:
        raise OptionError(f"unknown {name} {value!r}; choose one of {', '.join(known)}")
