"""The site: ``sphinx-build -W docs docs/_build`` builds it, without a network."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_extensions"))

os.environ.setdefault("TQDM_DISABLE", "1")  # bars are for terminals

from torchlinop import __version__  # noqa: E402  # after the bars are off

project = "torchlinop"
author = "The torchlinop developers"
copyright = "2026, the torchlinop developers"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",  # docstrings have Google's sections, which numpydoc does not read
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # MathJax from a package, not from a network
    "sphinx_gallery.gen_gallery",
    "sphinx_copybutton",
    "plain_docstrings",
    "linked_sources",
]

# Links to the pages of other projects need a network: TORCHLINOP_INTERSPHINX=1 asks for them.
if os.environ.get("TORCHLINOP_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "scipy": ("https://docs.scipy.org/doc/scipy", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }

exclude_patterns = ["_build", "_extensions", "_templates", "gallery/*.ipynb", "gallery/*.py"]
templates_path = ["_templates"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
highlight_language = "python"
smartquotes = False  # "--out" is an option, not a dash
default_role = "py:obj"  # `name`, in a docstring, is a name
# Not all of sphinx_gallery_conf can be pickled.
suppress_warnings = ["config.cache", "toc.empty_glob"]

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4

autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_default_options = {
    "members": True,
    "show-inheritance": True,
    # Members of these are on their own pages, not repeated on those of subclasses.
    "inherited-members": "CurvatureOperator,ObjectiveOperator,Exception,Protocol,dict,tuple",
}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Fields", "params_style")]  # of dataclasses, by plain_docstrings

# An example that needs more than a CPU and one process says so; it is shown, and not executed.
NEEDS_MORE = "not executed when this page is made"
EXAMPLES = sorted((HERE.parent / "examples").glob("*.py"))
EXECUTED = [example.stem for example in EXAMPLES if NEEDS_MORE not in example.read_text()]
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": rf"/({'|'.join(EXECUTED)})\.py$",
    "ignore_pattern": r"__init__\.py",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 3600,
    "write_computation_times": False,
    "plot_gallery": "True",
    "abort_on_example_error": True,
    "capture_repr": (),
    "remove_config_comments": True,
    "reset_modules": ("matplotlib", "fresh_process.reset"),
    "image_scrapers": ("matplotlib",),
    "backreferences_dir": "gallery/backreferences",
    "doc_module": ("torchlinop",),
    "inspect_global_variables": False,
}

html_theme = "pydata_sphinx_theme"
html_title = "torchlinop"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": "torchlinop"},
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "show_toc_level": 2,
    "header_links_before_dropdown": 8,
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": {"**": ["page-toc"], "index": []},
    "pygments_light_style": "tango",
}
html_sidebars = {"index": [], "changelog": [], "expectations": []}
copybutton_exclude = ".linenos, .gp, .go"
