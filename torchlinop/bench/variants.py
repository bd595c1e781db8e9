"""The ways an operator offers to run its kept product: as it is, compiled, as a CUDA graph."""

from __future__ import annotations

import inspect
from typing import Any, Unpack, get_args, get_origin, get_type_hints

EAGER = "eager"
COMPILED = ("cuda_graphs", "compile")  # keywords of operators; the one that starts faster first


def variants(operator: type) -> dict[str, dict[str, Any]]:
    """Options by the name of the way: eager, and those of ``COMPILED`` that it has keywords for."""
    offered = keywords(operator)
    return {EAGER: {}, **{name: {name: True} for name in COMPILED if name in offered}}


def keywords(operator: type) -> set[str]:
    """All that its constructor can be passed by name, options of a TypedDict included."""
    constructor = operator.__init__  # type: ignore[misc]
    names: set[str] = set()
    for name, parameter in inspect.signature(constructor).parameters.items():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            names.add(name)
            continue
        hint = get_type_hints(constructor).get(name)
        if get_origin(hint) is Unpack:
            (options,) = get_args(hint)
            names |= options.__required_keys__ | options.__optional_keys__
    return names - {"self"}
