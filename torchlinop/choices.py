"""Options that are one of a few names, and their own names."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping

from torchlinop.errors import OptionError


def refuse_unknown(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise OptionError, which lists the choices, for a value that is not among them."""
    known = tuple(choices)
    if not isinstance(value, str) or value not in known:
        raise OptionError(f"unknown {name} {value!r}; choose one of {', '.join(known)}")


def refuse_unknown_options(options: Mapping[str, object], known: Collection[str]) -> None:
    """Raise OptionError for a keyword that is not among ``known``."""
    for name in sorted(options.keys() - known):
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or sorted(known)
        raise OptionError(f"unknown option {name!r}; did you mean one of {', '.join(close)}?")
