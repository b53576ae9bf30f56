"""Sphinx: make docs."""

import jaxnorm

project = "jaxnorm"
author = "the jaxnorm authors"
release = jaxnorm.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"jaxnorm {release}"
myst_enable_extensions = ["dollarmath"]
autodoc_typehints = "none"
autodoc_member_order = "bysource"
exclude_patterns = ["_build"]
