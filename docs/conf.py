"""Sphinx configuration: `make docs` builds these pages with warnings as errors, without a network."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import gracile

project = "gracile"
author = "the gracile authors"
copyright = "the gracile authors"
version = release = gracile.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "gracile_docs"]
myst_enable_extensions = ["deflist", "colon_fence", "attrs_block"]
myst_heading_anchors = 4
source_suffix = {".md": "markdown"}
exclude_patterns = ["_ext", "_static"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"gracile {version}"
html_static_path = ["_static"]
html_css_files = ["gracile.css"]
html_show_copyright = False
html_show_sphinx = False
pygments_style = "friendly"
