"""The Python examples of README and docs run as they stand, one after the other, as a reader would paste them."""

import pathlib
import re
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = {
    page: re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE) for page in PAGES
}
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)(?:#[^)]*)?\)")
LINKS = [(page, link) for page in PAGES for link in LINK.findall(page.read_text())]
IMAGES = [
    (page, link) for page in PAGES for link in re.findall(r"^```\{image\} (\S+)", page.read_text(), flags=re.MULTILINE)
]
RUNNABLE = {"README.md", "faq.md", "index.md", "kernel.md", "migrating.md", "numerics.md", "parallel.md", "tiles.md"}


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if BLOCKS[page]], ids=lambda page: page.name)
def test_every_python_block_runs(page, run_python):
    """In a process of its own, since one page asks for eight devices."""
    run_python("\n".join(BLOCKS[page]) + "\nprint('done')")


def test_pages_have_examples():
    assert {page.name for page in PAGES if BLOCKS[page]} >= RUNNABLE


@pytest.mark.parametrize(("page", "link"), LINKS + IMAGES, ids=str)
def test_links_lead_somewhere(page, link):
    assert (page.parent / link).exists()


def test_the_readme_of_the_package_leads_nowhere_that_an_index_lacks():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    text = (ROOT / "README.md").read_text()
    for rule in project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    assert not LINK.findall(text)
    assert "![" not in text
    assert "[!WARNING]" not in text


def test_citation_and_changelog_name_the_version():
    version = re.search(r'"(.+)"', (ROOT / "jaxnorm" / "version.py").read_text().splitlines()[-1])[1]
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{version}] - " in (ROOT / "CHANGELOG.md").read_text()
