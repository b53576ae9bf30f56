"""The Python examples of README and docs run as they stand, one after the other, as a reader would paste them."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = {
    page: re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE) for page in PAGES
}
LINKS = [(page, link) for page in PAGES for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text())]


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCKS[page]], ids=lambda page: page.name)
def test_every_python_block_runs(page, run_python):
    """In a process of its own, since one page asks for eight devices."""
    run_python("\n".join(BLOCKS[page]) + "\nprint('done')")


def test_pages_have_examples():
    assert {page.name for page in PAGES if BLOCKS[page]} >= {"README.md", "numerics.md", "kernel.md", "parallel.md"}


@pytest.mark.parametrize(("page", "link"), LINKS, ids=str)
def test_links_lead_somewhere(page, link):
    assert (page.parent / link).exists()
