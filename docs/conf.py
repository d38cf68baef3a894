"""Sphinx configuration: Markdown pages read by MyST, API pages generated from the docstrings."""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS / "_extensions")]

import flash_internimage  # noqa: E402  from this checkout

project = "FlashInternImage"
author = "The FlashInternImage authors"
copyright = f"2026, {author}"
release = version = flash_internimage.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "readme_links",
    "zoo_tables",
]
exclude_patterns = ["README.md"]

# Markdown
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # included files begin with a heading of their own

# API pages
autodoc_inherit_docstrings = False  # those of OpenMMLab describe OpenMMLab
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
add_module_names = False
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# References into this project must resolve. Those to other libraries are left as text: the
# inventories that would resolve them need a network, which the build must not depend on.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!\.|ops_dcnv4|flash_internimage).*")]
nitpick_ignore = [("py:class", "flash_internimage.checkpoints.names.T")]  # a type variable

# HTML
html_theme = "pydata_sphinx_theme"
html_title = f"FlashInternImage {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_show_sourcelink = False
html_theme_options = {
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
copybutton_prompt_text = "$ "
