"""What README and docs say, as far as a program can tell: examples and diffs run, figures are in results files."""

import json
import pathlib
import re
import tomllib

import jax.numpy as jnp
import numpy as np
import pytest
from cases import exhaustive

import jaxnorm
from benchmarks import accuracy
from benchmarks.contenders import JAXNORM

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: page.read_text() for page in PAGES}


def fenced(page, language):
    """The blocks of code of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", TEXTS[page], flags=re.DOTALL | re.MULTILINE)


LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)(?:#[^)]*)?\)")
# A place for a figure that is not there yet: its name, and what belongs there.
UNFILLED = re.compile(r"<!-- TODO-FIGURES (\S+):.*?-->", re.DOTALL)
LINKS = [(page, link) for page in PAGES for link in LINK.findall(UNFILLED.sub("", TEXTS[page]))]
IMAGES = [
    (page, link) for page in PAGES for link in re.findall(r"^```\{image\} (\S+)", TEXTS[page], flags=re.MULTILINE)
]
RUNNABLE = {"README.md", "faq.md", "index.md", "kernel.md", "migrating.md", "numerics.md", "parallel.md", "tiles.md"}

# Each block as if it were pasted into a new session: with nothing of the others. They share a process, since most of
# the time goes into importing JAX.
RUN_EACH = """
import json, sys, types
for block in json.loads(BLOCKS):
    # What is pickled is looked up in the module __main__.
    session = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(block, block, "exec"), session.__dict__)
"""


def all_but_the_readme(page):
    """`make test` runs the examples of the README, `make test-all` those of every page."""
    return [] if page.name == "README.md" else [exhaustive]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.name, marks=all_but_the_readme(page)) for page in PAGES if fenced(page, "python")],
)
def test_every_python_block_runs_by_itself(page, run_python):
    """A page in a process of its own, since one of them asks for eight devices."""
    run_python(f"BLOCKS = {json.dumps(fenced(page, 'python'))!r}\n{RUN_EACH}")


def test_pages_have_examples():
    assert {page.name for page in PAGES if fenced(page, "python")} >= RUNNABLE


# A module before and after the diff: imports, and what its body makes of x and skip.
MODULE = """
{imports}
import flax.linen, jax, jax.numpy as jnp

class Network(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x, skip):
        x = flax.linen.Conv(4, (3, 3))(x)
        {body}
        return y

x, skip = 3 + jax.random.normal(jax.random.key(0), (2, 2, 8, 8, 4))
"""


def network(lines):
    """The namespace of MODULE with these lines."""
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    body = [line for line in lines if line and line not in imports]
    namespace = {"__name__": "network"}
    exec(MODULE.format(imports="\n".join(imports), body="\n        ".join(body)), namespace)
    return namespace


@pytest.mark.slow
@pytest.mark.parametrize(
    "diff",
    [
        pytest.param(diff, id=f"{page.name}-{i}", marks=all_but_the_readme(page))
        for page in PAGES
        for i, diff in enumerate(fenced(page, "diff"))
    ],
)
def test_a_network_takes_its_checkpoint_over_a_diff(diff):
    """Both sides of the diff run, and the second one loads the parameters of the first one and computes the same."""
    before, after = (
        network([line[1:] for line in diff.splitlines() if line[:1] in ("", " ", sign)]) for sign in ("-", "+")
    )
    x, skip = before["x"], before["skip"]
    variables = before["Network"]().init(jnp.uint32([0, 1]), x, skip)
    y = after["Network"]().apply(variables, x, skip)
    np.testing.assert_allclose(y, before["Network"]().apply(variables, x, skip), atol=2e-5)


@pytest.mark.parametrize(("page", "link"), LINKS + IMAGES, ids=str)
def test_links_lead_somewhere(page, link):
    assert (page.parent / link).exists()


# Figures. "<!-- figures: FILE ... -->" in a paragraph, a list item or a table says where its numbers come from.

FIGURES = re.compile(r"<!-- figures: ([^>]+?) -->")
NUMBER = re.compile(r"(?<![\w.^/-])(\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)(?![\w/^-]|\.\d)")
CODE = re.compile(r"`[^`]*`")
# What is measured or counted, and not the size or the version of something.
MEASURED = re.compile(r"\d(?:e[+-]?\d+|\.\d+ times|(?:\.\d+)?(?:x\b|%| ?ms\b| Mi?B\b| arrays\b))")


def passages(text):
    """The paragraphs, list items and tables of a page, without code and without places that are not filled."""
    text = re.sub(r"^```.*?^```", "", UNFILLED.sub("", text), flags=re.DOTALL | re.MULTILINE)
    return [passage for passage in re.split(r"\n\s*\n|\n(?=[*] )", text) if passage.strip()]


def numbers(line):
    """Each number of a line with half a unit of its last digit; those in code are none."""
    for number in NUMBER.findall(CODE.sub("", line)):
        mantissa, _, exponent = number.replace(",", "").partition("e")
        decimals = len(mantissa.partition(".")[2])
        yield float(number.replace(",", "")), 0.5 * 10.0 ** (int(exponent or 0) - decimals)


def is_in(line, source):
    """Whether each number of a line of the page is in a line of the source, up to rounding."""
    found = [value for value, _ in numbers(source)]
    return all(any(abs(value - other) <= 1.001 * half for other in found) for value, half in numbers(line))


PASSAGES = [(page, passage) for page in PAGES for passage in passages(TEXTS[page])]
QUOTED = [(page, passage) for page, passage in PASSAGES if FIGURES.search(passage)]


@pytest.mark.parametrize(("page", "passage"), QUOTED, ids=[f"{p.name}-{i}" for i, (p, _) in enumerate(QUOTED)])
def test_figures_are_in_the_file_that_they_come_from(page, passage):
    """Those of a row of a table in one line of the file, since any number is somewhere in a long file."""
    source = "\n".join((ROOT / name).read_text().replace("_", "") for name in FIGURES.search(passage)[1].split())
    text = FIGURES.sub("", passage)
    assert list(numbers(text))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for row in rows:
        assert any(is_in(row, line) for line in source.splitlines()), row
    rest = "\n".join(line for line in text.splitlines() if line not in rows)
    assert is_in(rest, source), rest


def test_every_figure_says_where_it_comes_from():
    readme = [passage for page, passage in PASSAGES if page.name == "README.md"]
    measured = [passage for passage in readme if MEASURED.search(CODE.sub("", passage))]
    assert not [passage for passage in measured if not FIGURES.search(passage)]


@pytest.mark.parametrize(
    ("figure", "source", "expected"),
    [
        ("| forward | 1.17 (0.59 to 5) |", "| forward | 60 | 1.171 (0.592 to 4.96) |", True),
        ("| forward | 1.18 |", "| forward | 1.171 |", False),
        ("5.2e-07 at 10,000", "N(10000, 1²) 5.21e-07", True),
        ("5.2e-07", "5.3e-07", False),
        ("float32 and `use(17)`", "", True),
    ],
)
def test_figures_are_compared_up_to_rounding(figure, source, expected):
    assert is_in(figure, source) == expected


def test_no_place_for_a_figure_is_left():
    assert not {page.name: UNFILLED.findall(text) for page, text in TEXTS.items() if UNFILLED.search(text)}


# Bounds that the pages state: errors are below them on any processor, where digits differ.

BELOW = 1e-6
OFFSETS = [0, 3, 100, 10_000, 1_000_000]
# Of data whose middle rows are far away: the center is taken there. With 12 seeds and 4 offsets 8.8e-6 was seen.
FEW_ROWS_AWAY = 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_errors_are_below_what_the_readme_says(dtype):
    noise = np.random.default_rng(0).standard_normal(accuracy.SHAPE)
    data = [(offset, 1) for offset in OFFSETS] + [(4e4, 200)] if dtype == "float32" else [(0, 1), (100, 1)]
    errors = [accuracy.error(accuracy.LAYERS[JAXNORM], jnp.asarray(noise * std + mean, dtype)) for mean, std in data]
    assert max(errors) < BELOW


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 1_000_000])
def test_errors_of_the_hardest_data(offset):
    data = np.random.default_rng(0).standard_normal((2, 24, 24, 8)) + offset
    data[:, 11:13] += 40  # 2 of 24 rows
    x = data.astype(np.float32)
    exact = accuracy.exact(x)
    errors = {
        name: np.abs(jaxnorm.instance_norm(x, channel_axis=-1, implementation=name) - exact).max()
        for name in ("xla", "reference")
    }
    assert errors["reference"] < BELOW
    assert errors["xla"] < FEW_ROWS_AWAY


# Versions.


def test_the_readme_of_the_package_leads_nowhere_that_an_index_lacks():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    text = (ROOT / "README.md").read_text()
    for rule in project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    assert not LINK.findall(text)
    assert "![" not in text
    assert "<!--" not in text
    assert "[!WARNING]" not in text


def test_citation_and_changelog_name_the_version():
    """Of a development version, which a changelog of changes that are not released has, those of the last release."""
    version = re.search(r'"(.+)"', (ROOT / "jaxnorm" / "version.py").read_text().splitlines()[-1])[1]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert version.endswith(".dev0") == ("## [Unreleased]" in changelog)
    released = re.search(r"^## \[([\d.]+)\] - ", changelog, flags=re.MULTILINE)[1]
    assert (f"Version {version}." in changelog) if version.endswith(".dev0") else version == released
    assert f"version: {released}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_layout_names_every_module():
    page = (ROOT / "docs" / "contributing.md").read_text()
    named = set(re.findall(r"`([\w/]+\.py)`", page.partition("## Code layout")[2].partition("## How")[0]))
    package = ROOT / "jaxnorm"
    modules = {str(path.relative_to(package)) for folder in ("", "gpu") for path in (package / folder).glob("*.py")}
    assert modules - named <= {"__init__.py", "gpu/__init__.py", "version.py"}
    assert {name for name in named if (package / name).parent.is_dir()} - modules <= {
        # Of selfcheck/, whose row names them without the folder.
        *("command.py", "plan.py", "cases.py", "numbers.py", "races.py", "times.py")
    }
