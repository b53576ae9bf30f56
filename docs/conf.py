"""Sphinx: make docs."""

import json
import pathlib
import sys

import jaxnorm

DOCS = pathlib.Path(__file__).parent
sys.path.insert(0, str(DOCS))


def copy_notebooks() -> None:
    """Sphinx reads what lies below this folder. Each page of a notebook offers the notebook as it is in the repository.

    A notebook that did not change is not written again, because Sphinx would then read it again.
    """
    folder = DOCS / "notebooks"
    folder.mkdir(exist_ok=True)
    for source in (DOCS.parent / "notebooks").glob("*.ipynb"):
        notebook = json.loads(source.read_text())
        link = f"{{download}}`Download this notebook <../../notebooks/{source.name}>`"
        notebook["cells"].insert(1, {"cell_type": "markdown", "id": "download", "metadata": {}, "source": link})
        copy, text = folder / source.name, json.dumps(notebook)
        if not copy.exists() or copy.read_text() != text:
            copy.write_text(text)


copy_notebooks()

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
# The prompts of examples in docstrings, and what these print, are not copied.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
# The notebooks are committed with their outputs.
nb_execution_mode = "off"
autodoc_typehints = "signature"
maximum_signature_line_length = 100
autodoc_member_order = "bysource"
exclude_patterns = ["_build"]
