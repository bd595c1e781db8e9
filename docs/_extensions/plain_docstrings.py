"""Docstrings as they are read in an editor, made fit for Sphinx.

|λ| is a modulus there and ``**options`` are options, where reStructuredText would see a
substitution and bold print; and a field is explained by the comment beside it, or above.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any, is_typeddict

from sphinx.application import Sphinx

_CODE = re.compile(r"(``.+?``|:\w+:`[^`]*`)")  # what is marked up already
_SPECIAL = re.compile(r"(?<!\\)([|*])")
_FIELD = re.compile(r"    (\w+): [^#]+?(?:  # (.+))?")
_COMMENT = re.compile(r"    # (.+)")


def plain(line: str) -> str:
    """The line with its bars and stars taken for what they are."""
    parts = _CODE.split(line)
    return "".join(p if _CODE.fullmatch(p) else _SPECIAL.sub(r"\\\1", p) for p in parts)


def comments_of(cls: type) -> dict[str, str]:
    """The comments of the fields that the source of one class has."""
    found: dict[str, str] = {}
    above: list[str] = []
    for line in inspect.getsource(cls).splitlines():
        if comment := _COMMENT.fullmatch(line):
            above.append(comment[1])
            continue
        if field := _FIELD.fullmatch(line):
            found[field[1]] = field[2] or " ".join(above)
        above = []
    return found


def explained_fields(cls: type) -> dict[str, str]:
    """Fields and their comments, its own and those it inherits."""
    if is_typeddict(cls):
        return {name: comments_of(cls).get(name, "") for name in vars(cls)["__annotations__"]}
    comments: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if "__dataclass_fields__" in vars(base):
            comments |= comments_of(base)
    names = [field.name for field in dataclasses.fields(cls)]
    return {name: comments.get(name, "") for name in names if not name.startswith("_")}


def process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Change the lines of a docstring in place, before napoleon reads its sections."""
    lines[:] = [line if line.lstrip().startswith(">>>") else plain(line) for line in lines]
    has_fields = what == "class" and (dataclasses.is_dataclass(obj) or is_typeddict(obj))
    if has_fields and "Attributes:" not in map(str.strip, lines):
        fields = explained_fields(obj)
        if fields:
            lines += ["", "Attributes:"]
            lines += [f"    {field}: {plain(comment)}" for field, comment in fields.items()]


def skip(app: Sphinx, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Fields are told of once, among the attributes."""
    without_words = inspect.ismemberdescriptor(obj) or isinstance(obj, dataclasses.Field)
    return True if without_words else None


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", process, priority=400)  # napoleon's is 500
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
