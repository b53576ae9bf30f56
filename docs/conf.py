"""Sphinx: make docs."""

import pathlib
import shutil
import sys

import jaxnorm

DOCS = pathlib.Path(__file__).parent
sys.path.insert(0, str(DOCS))
# Sphinx reads what lies below this folder.
(DOCS / "notebooks").mkdir(exist_ok=True)
for notebook in (DOCS.parent / "notebooks").glob("*.ipynb"):
    shutil.copy(notebook, DOCS / "notebooks")

project = "jaxnorm"
author = "the jaxnorm authors"
project_copyright = "the jaxnorm authors, Apache License 2.0"
release = jaxnorm.__version__
extensions = [
    "mathml",
    "signatures",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
html_theme = "furo"
html_title = f"jaxnorm {release}"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["jaxnorm.css"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
# The notebooks are committed with their outputs.
nb_execution_mode = "off"
autodoc_typehints = "signature"
maximum_signature_line_length = 100
autodoc_member_order = "bysource"
exclude_patterns = ["_build"]
