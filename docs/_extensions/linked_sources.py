"""Links to files of the repository, which work where the pages are read as files, on the site.

An example leads to its page in the gallery; another source file is given as a download by MyST.
"""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

_EXAMPLE = re.compile(r"\]\((?:\.\./)+examples/(\w+)\.py\)")
_EXAMPLES = re.compile(r"\]\((?:\.\./)+examples/?\)")


def follow(app: Sphinx, docname: str, source: list[str]) -> None:
    """Let links to examples lead to the gallery."""
    up = "../" * (len(Path(docname).parts) - 1)
    source[0] = _EXAMPLE.sub(rf"]({up}gallery/\1.rst)", source[0])
    source[0] = _EXAMPLES.sub(rf"]({up}gallery/index.rst)", source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", follow)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
