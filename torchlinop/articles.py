"""Names with their article, as messages have them: "a list", "an int" and so on."""

from __future__ import annotations


def with_article(name: str) -> str:
    """By the first letter; names in u sound as "you" more often than not: "a UserDict"."""
    return f"{'an' if name[:1].lower() in set('aeio') else 'a'} {name}"


def kind_of(thing: object) -> str:
    """The name of a thing's type, with its article."""
    return with_article(type(thing).__name__)
