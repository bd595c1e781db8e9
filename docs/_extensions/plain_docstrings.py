"""Docstrings as they are read in an editor, made fit for Sphinx.

|λ| is a modulus there and ``**options`` are options, where reStructuredText would see a
substitution and bold print; and a field is explained by the comment beside it, or above.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any, is_typeddict

from docutils import nodes
from sphinx.application import Sphinx

from torchlinop.algorithms.result import Result

_CODE = re.compile(r"(``.+?``|:\w+:`[^`]*`)")  # what is marked up already
_SPECIAL = re.compile(r"(?<!\\)([|*])")
_FIELD = re.compile(r"    (\w+): ([^#=]+?)(?: = [^#]+?)?(?:  # (.+))?")
_COMMENT = re.compile(r"    # (.+)")


def plain(line: str) -> str:
    """The line with its bars and stars taken for what they are."""
    parts = _CODE.split(line)
    return "".join(p if _CODE.fullmatch(p) else _SPECIAL.sub(r"\\\1", p) for p in parts)


def fields_of(cls: type) -> dict[str, str]:
    """A line for each field in the source of one class, with its type and its comment."""
    found: dict[str, str] = {}
    above: list[str] = []
    for line in inspect.getsource(cls).splitlines():
        if comment := _COMMENT.fullmatch(line):
            above.append(comment[1])
            continue
        if field := _FIELD.fullmatch(line):
            name, kind, beside = field.groups()
            found[name] = f"    {name} ({kind}): {plain(beside or ' '.join(above))}"
        above = []
    return found


def explained_fields(cls: type) -> list[str]:
    """A line for each public field, its own and those it inherits."""
    if is_typeddict(cls):
        return [*fields_of(cls).values()]
    lines: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if "__dataclass_fields__" in vars(base):
            lines |= fields_of(base)
    names = [field.name for field in dataclasses.fields(cls)]
    return [lines[name] for name in names if name in lines and not name.startswith("_")]


def process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Change the lines of a docstring in place, before napoleon reads its sections."""
    lines[:] = [line if line.lstrip().startswith(">>>") else plain(line) for line in lines]
    has_fields = what == "class" and (dataclasses.is_dataclass(obj) or is_typeddict(obj))
    if has_fields and "Attributes:" not in map(str.strip, lines):
        lines += ["", "Fields:", *explained_fields(obj)]


def signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, args: str, returns: str
) -> tuple[str, str] | None:
    """Results are not made by their readers: the list of fields is enough."""
    return ("", "") if what == "class" and issubclass(obj, Result) else None


def skip(app: Sphinx, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Fields are told of once, among the attributes."""
    without_words = inspect.ismemberdescriptor(obj) or isinstance(obj, dataclasses.Field)
    return True if without_words else None


def dashes(app: Sphinx, doctree: nodes.document) -> None:
    """Sphinx puts two hyphens between a parameter and what is said of it."""
    for text in [*doctree.findall(nodes.Text)]:
        if text == " -- ":
            text.parent.replace(text, nodes.Text(" – "))


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", process, priority=400)  # napoleon's is 500
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-skip-member", skip)
    app.connect("doctree-read", dashes)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
