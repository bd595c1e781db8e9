"""Whether a function can be called with so many arguments, as far as it tells."""

from __future__ import annotations

import inspect

from torch import nn


def takes(function: object, number: int, *, unknown: bool = True) -> bool:
    """Whether ``function`` takes ``number`` arguments by place; ``unknown`` if it does not tell.

    A module can be called with any arguments, which are those of its ``forward``.
    """
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        signature = inspect.signature(called)  # type: ignore[arg-type]  # also of what is none
    except (TypeError, ValueError):  # written in C++, say
        return unknown
    try:
        signature.bind(*[None] * number)
    except TypeError:
        return False
    return True
