"""Links to files of the repository, which work where the pages are read as files, on the site.

An example leads to its page in the gallery; CHANGELOG.md and its like, which stand at the root, to
pages of their own; another source file is given as a download by MyST.
"""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

_ROOT = Path(__file__).parents[2]
_AT_ROOT = {
    "changelog": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
    "security": "SECURITY.md",
}
_RELATIVE = re.compile(r"\]\((?!https?:|#)([^)]+)\)")
_EXAMPLE = re.compile(r"\]\((?:\.\./)+examples/(\w+)\.py\)")
_EXAMPLES = re.compile(r"\]\((?:\.\./)+examples/?\)")


def follow(app: Sphinx, docname: str, source: list[str]) -> None:
    """Change the text of a page before it is parsed."""
    text = source[0]
    if docname in _AT_ROOT:
        path = _ROOT / _AT_ROOT[docname]
        app.env.note_dependency(path)
        text = _RELATIVE.sub(_seen_from_docs, path.read_text())
    up = "../" * (len(Path(docname).parts) - 1)
    text = _EXAMPLE.sub(rf"]({up}gallery/\1.rst)", text)
    text = _EXAMPLES.sub(rf"]({up}gallery/index.rst)", text)
    for page, name in _AT_ROOT.items():
        text = text.replace(f"](../{up}{name})", f"]({up}{page}.md)")
    source[0] = text


def _seen_from_docs(link: re.Match[str]) -> str:
    """A link of a page at the root."""
    target = link[1]
    return f"]({target.removeprefix('docs/')})" if target.startswith("docs/") else f"](../{target})"


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", follow)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
